"""Which nodes a step reads, and whether its history can serve it: every refusal names the reason.

The network is evaluated at the start of every step, so the history at step i holds the nodes 0..i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import torch

from .step import MAX_ORDER, NAMES, RELAXATIONS, STATISTICAL, Nodes, Relax, Residual, StepStrategy

Steps = tuple[StepStrategy, ...]


class Stencil(msgspec.Struct, frozen=True):
    """A step's nodes as absolute indices: the start, and for derivative k = 1, 2, ... its nodes and relaxation."""

    start: int
    derivatives: tuple[tuple[tuple[int, ...], Relax], ...]


def predictor_stencil(steps: Steps, i: int) -> Stencil:
    """Absolute nodes of step i's predictor."""
    step = steps[i]
    start = i + 1 + step.start
    nodes = _latest(steps, i, start, step.order - 1) if step.nodes is None else absolute(step.nodes, i)
    return Stencil(start, _derivatives(step.order, nodes, step.d_nodes, step.relax, i))


def corrector_stencil(steps: Steps, i: int) -> Stencil:
    """Absolute nodes of step i's corrector; the node at the step's end is i + 1."""
    step, corr = steps[i], steps[i].corr
    assert corr is not None
    start = i + 1 + step.start
    if corr.nodes is not None:
        nodes = absolute(corr.nodes, i + 1)
    elif step.nodes is not None:
        nodes = (i + 1, *absolute(step.nodes, i))
    else:
        nodes = _latest(steps, i + 1, start, corr.order - 1)
    return Stencil(start, _derivatives(corr.order, nodes, corr.d_nodes, corr.relax, i + 1))


def _latest(steps: Steps, latest: int, start: int, count: int) -> tuple[int, ...]:
    """The ``count`` latest evaluated nodes other than the start; fewer where the history is short."""
    return tuple([n for n in range(latest, -1, -1) if n != start and _evaluated(steps, n)][:count])


def _evaluated(steps: Steps, node: int) -> bool:
    return node >= len(steps) or steps[node].eval.source != "none"


def check_step(steps: Steps, i: int) -> None:
    """Refuse step i if it cannot be taken where it stands.

    Raises:
        ValueError: with the reason.
    """
    step = steps[i]
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
    if step.hist_shift:
        _check_history(steps, i)
    if step.noise is not None:
        _check_noise(step)
    _check_stencil(steps, predictor_stencil(steps, i), i)
    if step.delta is not None and max(len(step.delta.x), len(step.delta.x0)) > i + 1:
        raise ValueError(f"delta names more nodes than the {i + 1} in the history")
    if step.corr is not None:
        _check_corrector(steps, i)


def _check_history(steps: Steps, i: int) -> None:
    step = steps[i]
    if not math.isfinite(step.hist_shift) or step.pred not in ("x0", "eps"):
        raise ValueError(f"hist_shift must be finite and needs pred 'x0' or 'eps', got {step.hist_shift} and {step.pred!r}")
    if i < 2 or not all(steps[j].eval.source == "model" for j in (i - 2, i - 1, i)):
        raise ValueError("hist_shift needs network evaluations at this step's node and the two before it")


def _check_corrector(steps: Steps, i: int) -> None:
    corr = steps[i].corr
    assert corr is not None
    if i == len(steps) - 1:
        raise ValueError("a corrector needs a network evaluation at the step's end, and the last step has none")
    if not _evaluated(steps, i + 1):
        raise ValueError("a corrector needs a network evaluation at the step's end, but the next step makes none")
    if not isinstance(corr.order, int) or not 2 <= corr.order <= MAX_ORDER + 1:
        raise ValueError(f"corrector order must be 2..{MAX_ORDER + 1}, got {corr.order!r}")
    try:
        _check_stencil(steps, corrector_stencil(steps, i), i + 1)
    except ValueError as error:
        raise ValueError(f"corrector: {error}") from None


def _check_stencil(steps: Steps, stencil: Stencil, latest: int) -> None:
    for k, (nodes, relax) in enumerate(stencil.derivatives, start=1):
        if not all(_evaluated(steps, node) for node in (*nodes, stencil.start)):
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


def _numbers(times: tuple[Any, ...]) -> Iterator[float]:
    return (float(t.detach() if torch.is_tensor(t) else t) for t in times)


def check_times(times: tuple[Any, ...], steps: Steps) -> None:
    """Refuse times that do not run one way, but for the steps that go back by adding noise.

    Raises:
        ValueError: naming the times.
    """
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


def absolute(nodes: tuple[int, ...], latest: int) -> tuple[int, ...]:
    """Nodes counted from the end of a history whose latest node is ``latest``, as indices.

    Raises:
        ValueError: a node outside the history.
    """
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
            chosen = absolute(own, latest)
        out.append((chosen, relax[k] if k < len(relax) else None))
    return tuple(out)


def _check_values(step: StepStrategy) -> None:
    for key, value in (("pred", step.pred), ("axis", step.axis), ("source", step.eval.source), ("keep", step.eval.keep)):
        if not isinstance(value, tuple) and value not in NAMES[key]:
            raise ValueError(f"unknown {key} {value!r}; known: {', '.join(NAMES[key])}")
    if isinstance(step.pred, tuple) and step.axis != "lambda":
        raise ValueError(f"pred (l, r) is defined on axis 'lambda' only, got {step.axis!r}")
    if step.pred in STATISTICAL and step.axis != "lambda":
        raise ValueError(f"pred {step.pred!r} is defined on axis 'lambda' only, got {step.axis!r}")
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
    if step.pred not in ("x0", "eps") or (step.pred == "eps" and noise.kind != "tau"):
        raise ValueError(f"noise of kind {noise.kind!r} is defined for pred 'x0' ('tau' for 'eps' too), got {step.pred!r}")
    if step.axis != "lambda" or (noise.kind == "fresh" and step.order > 1):
        raise ValueError("noise needs axis 'lambda', and kind 'fresh' order 1")
