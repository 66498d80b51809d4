"""Layer 1: what a person or a search edits. A solver schedule is times plus one step strategy per step; plain data.

Step i goes from ``times[i]`` to ``times[i + 1]``. The network is evaluated at the start of every step, so the history at step
i holds the nodes 0..i. Nodes are named from the end of that history: -1 is the latest node, -2 the one before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

FORMAT = "solver-schedule/1"
MAX_ORDER = 4
NAMES = {
    "pred": ("x0", "eps", "flow"),
    "axis": ("lambda", "sigma", "t", "index"),
    "source": ("model", "zero_x0", "average_x0", "none"),
}

RELAXATIONS = ("bh1", "bh2", "half", "exp+", "exp-", "diffusers-3m-sde")
Relax = float | Literal["bh1", "bh2", "half", "exp+", "exp-", "diffusers-3m-sde"] | None
Nodes = int | tuple[int, ...] | None


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Immutable, JSON-native, refuses unknown keys."""


class Corrector(_Data, frozen=True):
    """Redo the step once the network's answer at its end is known (UniC, arXiv:2302.04867; arXiv:2312.07243).

    Nodes count from the end of the history that includes the new node, which is -1.

    Attributes:
        order: Taylor order of the corrected step, 2..5.
        nodes: active nodes; None is the new node and the predictor's.
        d_nodes: as in `StepStrategy`.
        relax: as in `StepStrategy`.
        reeval: evaluate the network again at the corrected state (costs one NFE) instead of keeping the old answer.
    """

    order: int
    nodes: tuple[int, ...] | None = None
    d_nodes: tuple[Nodes, ...] = ()
    relax: tuple[Relax, ...] = ()
    reeval: bool = False


class Evaluation(_Data, frozen=True):
    """How the x0-prediction at the start of a step is obtained.

    Attributes:
        source: "model", or for the first step only an analytic one that costs no NFE: "zero_x0" (the state is pure noise)
            or "average_x0" (the data's mean). "none": no prediction at all; the step goes back to a noisier time by adding
            noise (churn, restart, the second half of a TCD step).
        t_scale: the network is told t_scale * t + t_shift instead of the state's own time (LD3, S4S, DyWeight).
        t_shift: see above.
    """

    source: Literal["model", "zero_x0", "average_x0", "none"] = "model"
    t_scale: float = 1.0
    t_shift: float = 0.0


class Noise(_Data, frozen=True):
    r"""Fresh noise in a step: the reverse SDE instead of the ODE, solved exactly for the expanded prediction.

    Attributes:
        kind: "tau": the SDE with diffusion $\tau^2$ times the usual one (SA-Solver, arXiv:2309.05019; 1 is ancestral
            sampling and SDE-DPM-Solver). "eta": DDIM's, $\eta \sigma_t \sqrt{1 - e^{-2h}}$ noise (arXiv:2010.02502, eq. 16).
            "fresh": all of the target's noise is new (consistency sampling: LCM).
        amount: tau >= 0 or eta in [0, 1].
        scale: multiplies the noise alone (k-diffusion's s_noise).
    """

    kind: Literal["tau", "eta", "fresh"] = "tau"
    amount: float = 1.0
    scale: float = 1.0


class Residual(_Data, frozen=True):
    """Learned additions to a step's compiled coefficients (S4S, GS, BNS, DyWeight), oldest node first.

    Attributes:
        x: added to the coefficients of the predicted states at nodes 0, 1, ...
        x0: added to the coefficients of the x0-predictions at nodes 0, 1, ...
    """

    x: tuple[float, ...] = ()
    x0: tuple[float, ...] = ()


class StepStrategy(_Data, frozen=True):
    r"""One step: a Taylor expansion of the network's prediction, integrated exactly (arXiv:2312.07243). Default: DDIM.

    Attributes:
        order: Taylor order 1..4; order p uses p - 1 estimated derivatives.
        pred: what is expanded: "x0" (data prediction), "eps" (noise prediction), "flow" (velocity eps - x0, flow models on axis
            "t") or a pair (l, r) between the first two: (1, 0) is x0 and (0, -1) is eps.
        axis: the variable in which it is a polynomial: "lambda", "sigma" (sigma/alpha), "t" or "index" (equal steps).
        start: node the step starts from; -1 the latest, -2 and less make single-step methods.
        nodes: active nodes besides the start; None takes the latest ones.
        d_nodes: per derivative: None all active nodes, m the m latest of them, or a tuple of nodes. Missing entries: None.
        relax: per derivative factor: None 1; r is 1 + r h; "bh1" and "bh2" of UniPC ("bh2" is also DPM-Solver++'s midpoint
            rule); "half" 0.5; "exp+" and "exp-" 1 +- (e^h - 1)/2; "diffusers-3m-sde" the second derivative's factor in
            diffusers' SDE-DPM-Solver++(3M), where one term has the opposite sign. Missing entries: None.
        corr: corrector applied once the network has answered at the step's end.
        eval: where the prediction at the step's start comes from.
        keep_eps: when x0 is clipped, keep the unclipped noise prediction in the first-order term (DDIM).
        noise: fresh noise, or None for the ODE.
        delta: learned additions to the coefficients.
    """

    order: int = 1
    pred: Literal["x0", "eps", "flow"] | tuple[float, float] = "x0"
    axis: Literal["lambda", "sigma", "t", "index"] = "lambda"
    start: int = -1
    nodes: tuple[int, ...] | None = None
    d_nodes: tuple[Nodes, ...] = ()
    relax: tuple[Relax, ...] = ()
    corr: Corrector | None = None
    eval: Evaluation = Evaluation()
    keep_eps: bool = False
    noise: Noise | None = None
    delta: Residual | None = None


class Stencil(msgspec.Struct, frozen=True):
    """A step's nodes as absolute indices: the start, and for derivative k = 1, 2, ... its nodes and relaxation."""

    start: int
    derivatives: tuple[tuple[tuple[int, ...], Relax], ...]


class SolverSchedule(_Data, frozen=True):
    """Times and one strategy per step: the object that is searched, saved and run.

    Attributes:
        times: len(steps) + 1 strictly decreasing times of the noise schedule (increasing: from data to noise).
        steps: one `StepStrategy` per interval.
        name: for people.
        path: the noise schedule the times belong to (its family is checked when the schedule is used), or None.
        clip: clamp x0 to [-clip, clip]; "config" leaves it to the diffusers scheduler's config; None never.
        provenance: anything JSON about where the schedule comes from.

    Raises:
        ValueError: at construction, for times out of order or a step that its history cannot serve, naming step and reason.
    """

    times: tuple[float, ...]
    steps: tuple[StepStrategy, ...]
    name: str = ""
    path: dict[str, Any] | None = None
    clip: float | Literal["config"] | None = None
    provenance: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Refuse an invalid schedule."""
        msgspec.structs.force_setattr(self, "times", tuple(t if torch.is_tensor(t) else float(t) for t in self.times))
        msgspec.structs.force_setattr(self, "steps", tuple(self.steps))
        _check_times(self.times, self.steps)
        if isinstance(self.clip, int):
            msgspec.structs.force_setattr(self, "clip", float(self.clip))
        if isinstance(self.clip, float) and not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        for i in range(len(self.steps)):
            try:
                self._check_step(i)
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
        content = _as_floats({key: value for key, value in self.to_dict().items() if key in ("times", "steps", "clip")})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def stencil(self, i: int) -> Stencil:
        """Absolute nodes of step i's predictor."""
        step = self.steps[i]
        start = i + 1 + step.start
        nodes = self._latest(i, start, step.order - 1) if step.nodes is None else _absolute(step.nodes, i)
        return Stencil(start, _derivatives(step.order, nodes, step.d_nodes, step.relax, i))

    def corrector_stencil(self, i: int) -> Stencil:
        """Absolute nodes of step i's corrector; the node at the step's end is i + 1."""
        step, corr = self.steps[i], self.steps[i].corr
        assert corr is not None
        start = i + 1 + step.start
        if corr.nodes is not None:
            nodes = _absolute(corr.nodes, i + 1)
        elif step.nodes is not None:
            nodes = (i + 1, *_absolute(step.nodes, i))
        else:
            nodes = self._latest(i + 1, start, corr.order - 1)
        return Stencil(start, _derivatives(corr.order, nodes, corr.d_nodes, corr.relax, i + 1))

    def _latest(self, latest: int, start: int, count: int) -> tuple[int, ...]:
        """The ``count`` latest evaluated nodes other than the start; fewer where the history is short."""
        return tuple([n for n in range(latest, -1, -1) if n != start and self._evaluated(n)][:count])

    def _evaluated(self, node: int) -> bool:
        return node >= len(self.steps) or self.steps[node].eval.source != "none"

    def _check_step(self, i: int) -> None:
        step = self.steps[i]
        if step.eval.source == "none":
            if step != StepStrategy(eval=step.eval, noise=step.noise):
                raise ValueError("a step without a prediction only adds noise: it takes no order, nodes, corrector or delta")
            return
        if not isinstance(step.order, int) or not 1 <= step.order <= MAX_ORDER:
            raise ValueError(f"order must be 1..{MAX_ORDER}, got {step.order!r}")
        if not -(i + 1) <= step.start <= -1:
            raise ValueError(f"start {step.start} is outside the history, which holds nodes -{i + 1}..-1")
        if step.eval.source in ("zero_x0", "average_x0") and i > 0:
            raise ValueError(f"source {step.eval.source!r} is analytic and only possible at steps[0]")
        _check_values(step)
        if step.noise is not None:
            _check_noise(step)
        self._check_stencil(self.stencil(i), i)
        if step.delta is not None and max(len(step.delta.x), len(step.delta.x0)) > i + 1:
            raise ValueError(f"delta names more nodes than the {i + 1} in the history")
        if step.corr is None:
            return
        if i == len(self.steps) - 1:
            raise ValueError("a corrector needs a network evaluation at the step's end, and the last step has none")
        if not self._evaluated(i + 1):
            raise ValueError("a corrector needs a network evaluation at the step's end, but the next step makes none")
        if not isinstance(step.corr.order, int) or not 2 <= step.corr.order <= MAX_ORDER + 1:
            raise ValueError(f"corrector order must be 2..{MAX_ORDER + 1}, got {step.corr.order!r}")
        try:
            self._check_stencil(self.corrector_stencil(i), i + 1)
        except ValueError as error:
            raise ValueError(f"corrector: {error}") from None

    def _check_stencil(self, stencil: Stencil, latest: int) -> None:
        for k, (nodes, relax) in enumerate(stencil.derivatives, start=1):
            if not all(self._evaluated(node) for node in (*nodes, stencil.start)):
                raise ValueError(f"derivative {k} names a node where the network is not evaluated")
            if len(set(nodes)) != len(nodes) or stencil.start in nodes:
                raise ValueError(f"derivative {k} names a node twice or the start itself")
            if len(nodes) < k:
                raise ValueError(
                    f"derivative {k} needs {k} nodes besides the start, but has {len(nodes)} (the history holds {latest + 1})"
                )
            if isinstance(relax, str) and relax not in RELAXATIONS:
                raise ValueError(f"unknown relaxation {relax!r}")
            if isinstance(relax, float) and not math.isfinite(relax):
                raise ValueError(f"relaxation of derivative {k} is {relax}")

    def tail(self, i: int) -> SolverSchedule:
        """The schedule from ``times[i]`` on, for entry in the middle; steps whose history is cut off become order 1."""
        steps = []
        for j, step in enumerate(self.steps[i:]):
            nodes = {self.stencil(i + j).start, *(n for d in self.stencil(i + j).derivatives for n in d[0])}
            nodes |= set(_absolute(step.nodes or (), i + j))
            residual = step.delta is not None and i > 0
            if min(nodes) >= i and not residual:
                if step.corr is not None:
                    needed = [n for d in self.corrector_stencil(i + j).derivatives for n in d[0]]
                    needed += _absolute(step.corr.nodes or (), i + j + 1)
                    if min(needed) < i:
                        step = msgspec.structs.replace(step, corr=None)
                steps.append(step)
            else:
                steps.append(StepStrategy(pred="x0", keep_eps=step.keep_eps))
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


# ---- helpers ---------------------------------------------------------------------------------------------------


def _as_floats(value: Any) -> Any:  # so that 1 and 1.0 have one digest
    if isinstance(value, dict):
        return {key: _as_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _numbers(times: tuple[Any, ...]) -> Iterator[float]:
    return (float(t.detach() if torch.is_tensor(t) else t) for t in times)


def _check_times(times: tuple[Any, ...], steps: tuple[StepStrategy, ...]) -> None:
    if len(steps) < 1 or len(times) != len(steps) + 1:
        raise ValueError(f"a schedule has one more time than steps, and at least one step; got {len(times)} and {len(steps)}")
    values = list(_numbers(times))
    for i, t in enumerate(values):
        if not math.isfinite(t):
            raise ValueError(f"times[{i}] is {t}")
    falling = values[0] > values[-1]
    for i, (a, b) in enumerate(pairwise(values)):
        back = steps[i].eval.source == "none"
        if a == b or (a > b) != (falling != back):
            word = "increase" if falling == back else "decrease"
            where = f" (steps[{i}] only adds noise)" if back else ""
            raise ValueError(f"times must strictly {word}{where}: times[{i}] = {a:g} and times[{i + 1}] = {b:g}")


def _absolute(nodes: tuple[int, ...], latest: int) -> tuple[int, ...]:
    for node in nodes:
        if not -(latest + 1) <= node <= -1:
            raise ValueError(f"node {node} is outside the history, which holds nodes -{latest + 1}..-1")
    return tuple(latest + 1 + node for node in nodes)


def _derivatives(
    order: int, nodes: tuple[int, ...], d_nodes: tuple[Nodes, ...], relax: tuple[Relax, ...], latest: int
) -> tuple[tuple[tuple[int, ...], Relax], ...]:
    if max(len(d_nodes), len(relax)) > order - 1:
        raise ValueError(f"order {order} has {order - 1} derivatives, but d_nodes or relax names more")
    newest_first = tuple(sorted(nodes, reverse=True))
    out = []
    for k in range(order - 1):
        own = d_nodes[k] if k < len(d_nodes) else None
        if own is None:
            chosen = newest_first
        elif isinstance(own, int):
            if own < 1:
                raise ValueError(f"d_nodes[{k}] must name at least one node, got {own}")
            chosen = newest_first[:own]
        else:
            chosen = _absolute(own, latest)
        out.append((chosen, relax[k] if k < len(relax) else None))
    return tuple(out)


def _check_values(step: StepStrategy) -> None:
    for key, value in (("pred", step.pred), ("axis", step.axis), ("source", step.eval.source)):
        if not isinstance(value, tuple) and value not in NAMES[key]:
            raise ValueError(f"unknown {key} {value!r}; known: {', '.join(NAMES[key])}")
    if isinstance(step.pred, tuple) and step.axis != "lambda":
        raise ValueError(f"pred (l, r) is defined on axis 'lambda' only, got {step.axis!r}")
    if step.pred == "flow" and step.axis not in ("t", "index"):
        raise ValueError(f"pred 'flow' is defined on axes 't' and 'index' only, got {step.axis!r}")
    delta, pair = step.delta or Residual(), step.pred if isinstance(step.pred, tuple) else ()
    if not all(math.isfinite(number) for number in _numbers((*pair, *delta.x, *delta.x0))):
        raise ValueError("pred and delta must be finite")


def _check_noise(step: StepStrategy) -> None:
    noise = step.noise
    assert noise is not None
    if noise.kind == "eta" and not 0 <= noise.amount <= 1:
        raise ValueError(f"eta must be in [0, 1], got {noise.amount}")
    if not (noise.amount >= 0 and math.isfinite(noise.amount) and noise.scale >= 0 and math.isfinite(noise.scale)):
        raise ValueError(f"noise amount and scale must be finite and >= 0, got {noise.amount} and {noise.scale}")
    if isinstance(step.pred, tuple) or step.pred == "flow" or (step.pred == "eps" and noise.kind != "tau"):
        raise ValueError(f"noise of kind {noise.kind!r} is defined for pred 'x0' ('tau' for 'eps' too), got {step.pred!r}")
    if step.axis != "lambda" or (noise.kind == "fresh" and step.order > 1):
        raise ValueError("noise needs axis 'lambda', and kind 'fresh' order 1")
