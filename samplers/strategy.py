"""Layer 1: what a person or a search edits. A solver schedule is times plus one step strategy per step; plain data.

Step i goes from ``times[i]`` to ``times[i + 1]``. The network is evaluated at the start of every step, so the history at step
i holds the nodes 0..i. Nodes are named from the end of that history: -1 is the latest node, -2 the one before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from .placement import Stencil, absolute, check_step, check_times, corrector_stencil, predictor_stencil
from .step import Corrector, Data, Evaluation, Nodes, Noise, Relax, Residual, ScalarStatistics, StepStrategy

__all__ = [
    "Corrector",
    "Evaluation",
    "Nodes",
    "Noise",
    "Relax",
    "Residual",
    "ScalarStatistics",
    "SolverSchedule",
    "Stencil",
    "StepStrategy",
    "configs_folder",
    "shipped_schedules",
]

FORMAT = "solver-schedule/1"
HASHED = ("times", "steps", "clip", "statistics")


class SolverSchedule(Data, frozen=True):
    """Times and one strategy per step: the object that is searched, saved and run.

    Attributes:
        times: len(steps) + 1 strictly decreasing times of the noise schedule (increasing: from data to noise).
        steps: one `StepStrategy` per interval.
        name: for people.
        path: the noise schedule the times belong to (its family is checked when the schedule is used), or None.
        clip: clamp x0 to [-clip, clip]; "config" leaves it to the diffusers scheduler's config; None never.
        statistics: scalar model statistics for its "v3" steps, where they travel with the schedule.
        provenance: anything JSON about where the schedule comes from.

    Raises:
        ValueError: at construction, for times out of order or a step that its history cannot serve, naming step and reason.
    """

    times: tuple[float, ...]
    steps: tuple[StepStrategy, ...]
    name: str = ""
    path: dict[str, Any] | None = None
    clip: float | Literal["config"] | None = None
    statistics: ScalarStatistics | None = None
    provenance: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an invalid schedule."""
        msgspec.structs.force_setattr(self, "times", tuple(t if torch.is_tensor(t) else float(t) for t in self.times))
        msgspec.structs.force_setattr(self, "steps", tuple(self.steps))
        check_times(self.times, self.steps)
        if isinstance(self.clip, int):
            msgspec.structs.force_setattr(self, "clip", float(self.clip))
        if isinstance(self.clip, float) and not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        for i in range(len(self.steps)):
            try:
                check_step(self.steps, i)
            except ValueError as error:
                raise ValueError(f"steps[{i}]: {error}") from None

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Network evaluations per sample: steps, less an analytic first one, plus re-evaluating correctors."""
        evaluated = sum(step.eval.source == "model" for step in self.steps)
        return evaluated + sum(step.corr is not None and step.corr.reeval for step in self.steps)

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise."""
        return any(step.noise is not None or step.eval.source == "none" for step in self.steps)

    @property
    def analytic_first_step(self) -> bool:
        """Whether the first x0-prediction is analytic rather than the network's."""
        return self.steps[0].eval.source in ("zero_x0", "average_x0")

    @property
    def digest(self) -> str:
        """Hash of everything that decides the numbers (not of name, path or provenance)."""
        content = _as_floats({key: value for key, value in self.to_dict().items() if key in HASHED})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def stencil(self, i: int) -> Stencil:
        """Absolute nodes of step i's predictor."""
        return predictor_stencil(self.steps, i)

    def corrector_stencil(self, i: int) -> Stencil:
        """Absolute nodes of step i's corrector; the node at the step's end is i + 1."""
        return corrector_stencil(self.steps, i)

    def tail(self, i: int) -> SolverSchedule:
        """The schedule from ``times[i]`` on, for entry in the middle.

        A step whose history is cut off becomes the step that this schedule makes with as much history at its own start, so
        that a multistep rule warms up again; or of order 1, where that is a step of another kind.
        """
        steps = []
        for j, step in enumerate(self.steps[i:]):
            nodes = {self.stencil(i + j).start, *(n for d in self.stencil(i + j).derivatives for n in d[0])}
            nodes |= set(absolute(step.nodes or (), i + j))
            if step.hist_shift:
                nodes.add(i + j - 2)
            residual = step.delta is not None and i > 0
            if min(nodes) >= i and not residual:
                if step.corr is not None:
                    needed = [n for d in self.corrector_stencil(i + j).derivatives for n in d[0]]
                    needed += absolute(step.corr.nodes or (), i + j + 1)
                    if min(needed) < i:
                        step = msgspec.structs.replace(step, corr=None)
                steps.append(step)
            else:
                warm = self.steps[j] if _warms_up(self.steps[j], step) else StepStrategy(pred="x0", keep_eps=step.keep_eps)
                steps.append(msgspec.structs.replace(warm, noise=step.noise, eval=step.eval))
        return msgspec.structs.replace(self, times=self.times[i:], steps=tuple(steps))

    # ---- files -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-native form; `from_dict` is its inverse."""
        return {"format": FORMAT, "nfe": self.nfe, **msgspec.to_builtins(self)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> SolverSchedule:
        """Read the JSON form.

        ``defaults`` are inherited by every step; ``nfe`` must agree with the steps.

        Raises:
            ValueError: an unknown key, a wrong type, a wrong ``format`` or ``nfe``, or an invalid step.
        """
        data = dict(mapping)
        form, nfe, defaults = data.pop("format", None), data.pop("nfe", None), data.pop("defaults", {})
        if form != FORMAT:
            raise ValueError(f"not a solver schedule: format is {form!r}, expected {FORMAT!r}")
        if not isinstance(defaults, Mapping):
            raise ValueError("defaults must be an object of step strategy keys")
        if isinstance(data.get("steps"), list | tuple):
            data["steps"] = [{**defaults, **s} if isinstance(s, Mapping) else s for s in data["steps"]]
        try:
            schedule = msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"invalid solver schedule: {error}") from None
        if nfe is not None and nfe != schedule.nfe:
            raise ValueError(f"invalid solver schedule: it says nfe {nfe}, its steps make {schedule.nfe} evaluations")
        return schedule

    @classmethod
    def from_usf(cls, mapping: Mapping[str, Any]) -> SolverSchedule:
        """Read the dict format of the published USF schedules; see `samplers.usf.from_usf`."""
        from .usf import from_usf

        return from_usf(mapping)

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> SolverSchedule:
        """A schedule from a dict, the path of an existing JSON file, or the name of one that ships.

        Raises:
            ValueError: malformed content.
            FileNotFoundError: neither a file nor a shipped name; the message lists the latter.
        """
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        path = Path(source)
        if not path.is_file():
            shipped = shipped_schedules()
            if str(source) not in shipped:
                known = ", ".join(sorted(shipped)) or "none"
                raise FileNotFoundError(f"{source}: no such file, nor a schedule that ships (those are: {known})")
            path = shipped[str(source)]
        try:
            data = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"{path}: a solver schedule is a JSON object, got {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def configs_folder() -> Path:
    """The configs that come with the package: inside it when installed, beside it in a source tree."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_schedules() -> dict[str, Path]:
    """Names and files of the found schedules that come with the package."""
    return {path.stem: path for path in (configs_folder() / "schedules").glob("*.json")}


def _warms_up(first: StepStrategy, later: StepStrategy) -> bool:
    """Whether a step from a schedule's start is of the same kind as a later one, and owes nothing to its place."""
    corr = first.corr
    bare = first.start == -1 and first.nodes is None and not (first.d_nodes or first.hist_shift or first.delta)
    bare = bare and (corr is None or (corr.nodes is None and not corr.d_nodes))
    named = all(r is None or isinstance(r, str) for r in (*first.relax, *(() if corr is None else corr.relax)))
    alike = all(getattr(first, name) == getattr(later, name) for name in ("pred", "axis", "start", "keep_eps"))
    return bare and named and alike and first.order <= later.order and (corr is None) == (later.corr is None)


def _as_floats(value: Any) -> Any:  # so that 1 and 1.0 have one digest
    if isinstance(value, dict):  # an object of defaults may or may not have been left out
        return {key: _as_floats(item) for key, item in value.items() if item != {}}
    if isinstance(value, list | tuple):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
