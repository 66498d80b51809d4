"""The transitions of discrete diffusion: what turns a posterior into the next state.

Three kinds. A *kernel* draws every site independently from its row. A *two-stage* transition leaps to a trial state, asks the
model again, and leaps with combined rates. A *selection* decides together which masked sites are revealed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .kernels import euler_rows, tau_rows
from .processes import MaskedProcess, Process

MASKED, BOTH = ("masked",), ("masked", "uniform")


@dataclass(frozen=True)
class Step:
    """One step's numbers: index of M steps, times t -> s, and the knobs (None or neutral where unused)."""

    index: int
    steps: int
    t: Any
    s: Any
    rate: Any = 1.0
    temp: Any = 1.0
    unmask: Any = None
    remask: Any = 0.0
    target: Any = None  # share of the initially masked sites that is revealed after the step

    @property
    def last(self) -> bool:
        """Whether the run ends here; then every kernel takes a draw of the posterior."""
        return self.index == self.steps - 1


Rows = Callable[[Process, Tensor, Tensor, Step, dict[str, float]], Tensor]


@dataclass(frozen=True)
class Transition:
    """A transition and what is known about it.

    Attributes:
        name: its name.
        kind: "kernel", "two_stage", "count", "confidence" or "first_hitting".
        processes: the processes it works on.
        knobs: the knobs of `DiscreteTable` it takes.
        order: order of the law's error in the step size, over a whole run; None where the error has no step size.
        source: where it comes from.
        rows: the kernel of a "kernel" transition.
        parameters: its numbers, as the text sets them.
    """

    name: str
    kind: str
    processes: tuple[str, ...]
    knobs: tuple[str, ...]
    order: int | None
    source: str
    rows: Rows | None = None
    parameters: dict[str, float] = field(default_factory=dict)

    @property
    def nfe_per_step(self) -> int:
        """Network evaluations of a step that is not the last."""
        return 2 if self.kind == "two_stage" else 1

    def nfe(self, steps: int) -> int:
        """Network evaluations of a run of ``steps`` steps."""
        return 2 * steps - 2 + int(self.parameters["last"]) if self.kind == "two_stage" else steps

    def steps(self, nfe: int) -> int:
        """Steps that ``nfe`` network evaluations allow."""
        if nfe < 1 or nfe != int(nfe):
            raise ValueError(f"nfe must be a whole number of at least 1, got {nfe}")
        return (nfe + 1) // 2 if self.kind == "two_stage" else nfe

    def check(self, process: str) -> None:
        """Refuse a process it does not work on."""
        if process not in self.processes:
            raise ValueError(f"{self.name} works on {' and '.join(self.processes)} processes, not on {process}")

    @property
    def text(self) -> str:
        """The text that `transition` reads back."""
        default = CATALOGUE[self.name].parameters
        changed = [f"{key}={value:g}" for key, value in self.parameters.items() if value != default[key]]
        return self.name + (":" + ",".join(changed) if changed else "")


def _euler(process: Process, probs: Tensor, x: Tensor, step: Step, parameters: dict[str, float]) -> Tensor:
    return euler_rows(process.reverse_rates(probs, x, step.t) * (step.rate * (step.t - step.s)), x)


def _tau(process: Process, probs: Tensor, x: Tensor, step: Step, parameters: dict[str, float]) -> Tensor:
    return tau_rows(process.reverse_rates(probs, x, step.t) * (step.rate * (step.t - step.s)), x)


def _tweedie(process: Process, probs: Tensor, x: Tensor, step: Step, parameters: dict[str, float]) -> Tensor:
    if step.unmask is not None and isinstance(process, MaskedProcess):
        return process.reveal(probs, x, step.unmask)
    return process.bridge(probs, x, step.t, step.s)


def _remdm(process: MaskedProcess, probs: Tensor, x: Tensor, step: Step, parameters: dict[str, float]) -> Tensor:
    alpha_t, alpha_s = process.alpha(step.t), process.alpha(step.s)
    redo = parameters["eta"] * torch.clamp((1.0 - alpha_s) / alpha_t, max=1.0)
    rows = process.reveal(probs, x, ((alpha_s - (1.0 - redo) * alpha_t) / (1.0 - alpha_t)).clamp(0.0, 1.0))
    revealed = (x != process.mask_id)[..., None]
    masked = torch.nn.functional.one_hot(torch.tensor(process.mask_id), process.states).to(rows)
    return torch.where(revealed, (1.0 - redo) * rows + redo * masked, rows)


def _entropy_bound(process: MaskedProcess, probs: Tensor, x: Tensor, step: Step, parameters: dict[str, float]) -> Tensor:
    hidden = x == process.mask_id
    entropy, site = torch.special.entr(probs).sum(-1).masked_fill(~hidden, torch.inf).sort(dim=-1, stable=True)
    chosen = entropy.cumsum(-1) - entropy <= parameters["bound"]  # all but the largest entropy count; the surest site passes
    chosen = torch.zeros_like(hidden).scatter(-1, site, chosen) & hidden
    return process.reveal(probs, x, chosen.to(probs.dtype)[..., None])


_SHAPE = {"top_p": 1.0, "temperature": 1.0}
_SECOND = "Ren et al. 2025, arXiv:2502.00234"
_KERNEL_KNOBS = ("rate", "temp", "remask")

CATALOGUE = {
    item.name: item
    for item in (
        Transition("euler", "kernel", BOTH, _KERNEL_KNOBS, 1, "Lou et al. 2024, arXiv:2310.16834", _euler, _SHAPE),
        Transition("tau", "kernel", BOTH, _KERNEL_KNOBS, 1, "Campbell et al. 2022, arXiv:2205.14987", _tau, _SHAPE),
        Transition(
            "tweedie",
            "kernel",
            BOTH,
            ("temp", "unmask", "remask"),
            1,
            "arXiv:2310.16834, Tweedie tau-leaping",
            _tweedie,
            _SHAPE,
        ),
        Transition(
            "remdm", "kernel", MASKED, ("temp",), 1, "Wang et al. 2025, arXiv:2503.00307", _remdm, _SHAPE | {"eta": 0.1}
        ),
        Transition(
            "theta_trapezoidal", "two_stage", BOTH, ("rate", "temp"), 2, _SECOND, None, _SHAPE | {"theta": 0.5, "last": 1}
        ),
        Transition("theta_rk2", "two_stage", BOTH, ("rate", "temp"), 1, _SECOND, None, _SHAPE | {"theta": 0.5, "last": 1}),
        Transition(
            "fixed_count", "count", MASKED, ("temp", "count", "remask"), None, "Nie et al. 2025, arXiv:2502.09992", None, _SHAPE
        ),
        Transition(
            "confidence",
            "confidence",
            MASKED,
            ("temp", "count", "remask"),
            None,
            "Chang et al. 2022, arXiv:2202.04200",
            None,
            _SHAPE | {"noise": 0.0},
        ),
        Transition(
            "entropy_bound",
            "kernel",
            MASKED,
            ("temp",),
            None,
            "Ben-Hamu et al. 2025, arXiv:2505.24857",
            _entropy_bound,
            _SHAPE | {"bound": 0.1},
        ),
        Transition(
            "first_hitting", "first_hitting", MASKED, ("temp",), None, "Zheng et al. 2024, arXiv:2409.02908", None, _SHAPE
        ),
    )
}


def transition(text: str) -> Transition:
    """The transition of a text ``NAME[:key=value,...]``, for example "confidence:noise=4.5".

    Raises:
        ValueError: unknown name, key or value; the message lists the known ones.
    """
    name, _, tail = text.partition(":")
    if name not in CATALOGUE:
        raise ValueError(f"unknown discrete transition {name!r}; known: {', '.join(CATALOGUE)}")
    base = CATALOGUE[name]
    parameters = dict(base.parameters)
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
        if key not in parameters:
            raise ValueError(f"{name} has no parameter {key!r}; it has {', '.join(parameters)}")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise ValueError(f"{name}: {key}={value!r} is not a number") from None
    bounds = {"top_p": (1e-9, 1.0), "theta": (1e-3, 0.999), "eta": (0.0, 1.0), "noise": (0.0, 1e6), "bound": (0.0, 1e6)}
    bounds["temperature"] = (0.01, 100.0)
    for key, (low, high) in bounds.items():
        if key in parameters and not low <= parameters[key] <= high:
            raise ValueError(f"{name}: {key} must be in [{low:g}, {high:g}], got {parameters[key]:g}")
    if parameters.get("last", 1) not in (1, 2):
        raise ValueError(f"{name}: last is the number of network calls of the last step, 1 or 2, got {parameters['last']:g}")
    return replace(base, parameters=parameters)


def trial_rows(base: Transition, jumps: Tensor, x: Tensor, step: Step) -> Tensor:
    """Kernel of a two-stage transition's first leap; ``jumps`` are the rates at (x, t), times the rate knob."""
    return tau_rows(jumps * (base.parameters["theta"] * (step.t - step.s)), x)


def trial_time(base: Transition, step: Step) -> Any:
    """Time at which a two-stage transition asks the model again."""
    return step.t - base.parameters["theta"] * (step.t - step.s)


def second_rows(base: Transition, before: Tensor, after: Tensor, x: Tensor, trial: Tensor, step: Step) -> Tensor:
    """Kernel of a two-stage transition's second leap.

    Args:
        base: the transition.
        before: rates (B, L, S) at x and t.
        after: rates (B, L, S) at the trial state and its time.
        x: ids (B, L) at t.
        trial: ids (B, L) of the trial state.
        step: the step.
    """
    theta, width = base.parameters["theta"], step.t - step.s
    if base.name == "theta_rk2":
        mixed = (1.0 - 0.5 / theta) * before + 0.5 / theta * after
        return tau_rows(mixed.clamp(min=0.0) * width, x)
    gain = 0.5 / (theta * (1.0 - theta))
    loss = ((1.0 - theta) ** 2 + theta**2) * gain
    return tau_rows((gain * after - loss * before).clamp(min=0.0) * ((1.0 - theta) * width), trial)
