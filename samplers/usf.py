"""Reader of the dict format in which the unified-sampling-framework schedules (arXiv:2312.07243) are published."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .strategy import Corrector, Evaluation, Relax, SolverSchedule, StepStrategy

_PREDICTIONS = {"noise_prediction": "eps", "data_prediction": "x0", "dpmsolver_v3_prediction": "v3-nodes"}
_SOURCES = {"no_afs": "model", "zero_x0": "zero_x0", "average_x0": "average_x0"}
_RELAXATIONS = {"unipc-bh1": "bh1", "unipc-bh2": "bh2", "dpmsolver-2": "bh2", "0.5exp": "exp+", "-0.5exp": "exp-"}
_REQUIRED = ("timesteps", "orders", "prediction_types", "derivative_types", "corrector_types", "start_points", "afs")
_OPTIONAL = ("skip_coefficients",)


def from_usf(mapping: Mapping[str, Any]) -> SolverSchedule:
    """The `SolverSchedule` of a published dict.

    Args:
        mapping: ``timesteps`` (steps + 1), ``afs``, and one entry per step in ``orders``, ``start_points``,
            ``prediction_types``, ``derivative_types``, ``corrector_types``; other keys are ignored with a warning.

    Raises:
        ValueError: a key is missing, lists disagree in length, or a value is unknown.
    """
    missing = [key for key in _REQUIRED if key not in mapping]
    if missing:
        raise ValueError(f"not a USF schedule: missing {', '.join(missing)}")
    unknown = sorted(set(mapping) - set(_REQUIRED) - set(_OPTIONAL))
    if unknown:
        warnings.warn(f"USF schedule: ignored keys {', '.join(unknown)}", stacklevel=3)
    times = tuple(float(t) for t in mapping["timesteps"])
    n = len(times) - 1
    for key in ("orders", "prediction_types", "derivative_types", "corrector_types", "start_points"):
        if len(mapping[key]) != n:
            raise ValueError(f"USF schedule: {key} has {len(mapping[key])} entries for {n} steps")
    steps = []
    for i in range(n):
        order, pred = int(mapping["orders"][i]), _known(mapping["prediction_types"][i], _PREDICTIONS, "prediction type")
        nodes, relax = _derivatives(mapping["derivative_types"][i], order)
        source: Any = _known(mapping["afs"], _SOURCES, "afs") if i == 0 else "model"
        steps.append(
            StepStrategy(
                order=order,
                pred=pred,
                start=int(mapping["start_points"][i]),
                nodes=nodes[-1] if nodes else (),
                d_nodes=nodes,
                relax=relax,
                corr=_corrector(mapping["corrector_types"][i]),
                eval=Evaluation(source=source),
            )
        )
    return SolverSchedule(times=times, steps=tuple(steps), provenance=_provenance(mapping))


def _known(value: Any, table: Mapping[str, str], what: str) -> Any:
    if value not in table:
        raise ValueError(f"USF schedule: unknown {what} {value!r}; known: {', '.join(table)}")
    return table[value]


def _derivatives(entries: Sequence[Mapping[str, Any]], order: int) -> tuple[tuple[tuple[int, ...], ...], tuple[Relax, ...]]:
    if len(entries) != order - 1:
        raise ValueError(f"USF schedule: order {order} needs {order - 1} derivative types, got {len(entries)}")
    nodes = tuple(tuple(int(n) for n in entry["active_points"]) for entry in entries)
    relax: list[Relax] = []
    for entry in entries:
        name = entry.get("relaxation")
        if name in (None, "no_relaxation"):
            relax.append(None)
        elif name == "linear":
            relax.append(float(entry["relaxation_coefficient"]))
        else:
            relax.append(_known(name, _RELAXATIONS, "relaxation"))
    return nodes, tuple(relax)


def _corrector(entry: Mapping[str, Any]) -> Corrector | None:
    kind = entry["type"]
    if kind == "no_corrector":
        return None
    if kind not in ("pseudo", "implicit"):
        raise ValueError(f"USF schedule: unknown corrector {kind!r}; known: no_corrector, pseudo, implicit")
    order = int(entry["taylor_order"])
    nodes, relax = _derivatives(entry["derivative_type"], order)
    return Corrector(order=order, nodes=nodes[-1], d_nodes=nodes, relax=relax, reeval=kind == "implicit")


def _provenance(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Factors of U-Net skips are kept for `samplers.schedulers.scaled_skips`: they edit the network, not the solver."""
    facts: dict[str, Any] = {"imported_from": "usf"}
    if mapping.get("skip_coefficients") is not None:
        facts["skip_coefficients"] = [float(factor) for factor in mapping["skip_coefficients"]]
    return facts
