"""One step of a solver schedule as plain data: what a person or a search edits.

Nodes are named from the end of the history: -1 is the latest node, -2 the one before.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_ORDER = 4
NAMES = {
    "pred": ("x0", "eps", "flow", "v3", "v3-nodes"),
    "axis": ("lambda", "sigma", "t", "index"),
    "source": ("model", "zero_x0", "average_x0", "none"),
    "keep": ("x0", "eps"),
}

STATISTICAL = ("v3", "v3-nodes")  # the predictions that need empirical model statistics
RELAXATIONS = ("bh1", "bh2", "half", "exp+", "exp-", "diffusers-3m-sde")
Relax = float | Literal["bh1", "bh2", "half", "exp+", "exp-", "diffusers-3m-sde"] | None
Nodes = int | tuple[int, ...] | None


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Immutable, JSON-native, refuses unknown keys."""


class Corrector(Data, frozen=True):
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


class Evaluation(Data, frozen=True):
    """How the x0-prediction at the start of a step is obtained.

    Attributes:
        source: "model", or for the first step only an analytic one that costs no NFE: "zero_x0" (the state is pure noise)
            or "average_x0" (the data's mean). "none": no prediction at all; the step goes back to a noisier time by adding
            noise (churn, restart, the second half of a TCD step).
        t_scale: the network is told t_scale * t + t_shift instead of the state's own time (LD3, S4S, DyWeight).
        t_shift: see above.
        keep: what the answer at another time is taken for at the state's own: its "x0" (EDM-style methods) or its noise
            prediction "eps" (LD3, S4S, GS).
    """

    source: Literal["model", "zero_x0", "average_x0", "none"] = "model"
    t_scale: float = 1.0
    t_shift: float = 0.0
    keep: Literal["x0", "eps"] = "x0"


class Noise(Data, frozen=True):
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


class Residual(Data, frozen=True):
    """Learned additions to a step's compiled coefficients (S4S, GS, BNS, DyWeight), oldest node first.

    Attributes:
        x: added to the coefficients of the predicted states at nodes 0, 1, ...
        x0: added to the coefficients of the x0-predictions at nodes 0, 1, ...
    """

    x: tuple[float, ...] = ()
    x0: tuple[float, ...] = ()


class StepStrategy(Data, frozen=True):
    r"""One step: a Taylor expansion of the network's prediction, integrated exactly (arXiv:2312.07243). Default: DDIM.

    Attributes:
        order: Taylor order 1..4; order p uses p - 1 estimated derivatives.
        pred: what is expanded: "x0" (data prediction), "eps" (noise prediction), "flow" (velocity eps - x0, flow models on axis
            "t"), a pair (l, r) between the first two: (1, 0) is x0 and (0, -1) is eps, or "v3": what DPM-Solver-v3 expands,
            given the model's `EmpiricalStatistics` (arXiv:2310.13268). "v3-nodes" reads them as published schedules were run:
            every time counts as the statistics' nearest node.
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
        hist_shift: replace the prediction at this step's node by the quadratic in t through the last three, read at
            t_i + hist_shift (t_i - t_{i-1}); for "x0" and "eps" (DC-Solver, arXiv:2409.03755, with rho = 1 + hist_shift).
        noise: fresh noise, or None for the ODE.
        delta: learned additions to the coefficients.
    """

    order: int = 1
    pred: Literal["x0", "eps", "flow", "v3", "v3-nodes"] | tuple[float, float] = "x0"
    axis: Literal["lambda", "sigma", "t", "index"] = "lambda"
    start: int = -1
    nodes: tuple[int, ...] | None = None
    d_nodes: tuple[Nodes, ...] = ()
    relax: tuple[Relax, ...] = ()
    corr: Corrector | None = None
    eval: Evaluation = Evaluation()
    keep_eps: bool = False
    hist_shift: float = 0.0
    noise: Noise | None = None
    delta: Residual | None = None


class ScalarStatistics(Data, frozen=True):
    """Empirical model statistics with one number per node, small enough to travel inside a schedule.

    Attributes:
        lam: the first and the last node; the others lie evenly between them.
        l: per node, as in `samplers.statistics.EmpiricalStatistics`.
        s: per node.
        b: per node.

    Raises:
        ValueError: lists that differ in length or hold fewer than two nodes, or lambda that does not increase.
    """

    lam: tuple[float, float]
    l: tuple[float, ...]
    s: tuple[float, ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is not a grid."""
        if not len(self.l) == len(self.s) == len(self.b) >= 2:
            counts = f"{len(self.l)}, {len(self.s)} and {len(self.b)}"
            raise ValueError(f"statistics: l, s and b need one number per node, at least two, got {counts}")
        if not self.lam[0] < self.lam[1]:
            raise ValueError(f"statistics: lam must increase, got {self.lam[0]:g} to {self.lam[1]:g}")
