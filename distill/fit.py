"""`fit_discrete_sampler`: choose families of tables, fit each, judge them on what the objective never saw, keep the best."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplers.discrete import DiscreteTable, Model, Process, push_table

from .exact import exact_kl, fit_exact
from .judge import check_names, default_holdout, exact_scores, floor_scores, reasons_against, sampled_scores
from .knobs import KnobSpace, default_spaces
from .sampled import SAMPLED, choose_objective, fit_sampled, statistic
from .score import ScoreFit, fit_score
from .statistics import objective_windows
from .target import Target, Teacher, draw_many, enumerable, model_digest, resolve_target

OBJECTIVES = ("auto", "exact_kl", *SAMPLED, "score_l2", "score_l2_block")
Progress = Callable[[str, int, int, float], None]  # what is done, how far, of how much, value


@dataclass(frozen=True)
class FitSettings:
    """Effort and bookkeeping of a fit.

    Attributes:
        budget: candidates of the search, or gradient steps for exact_kl; None: 350 and 120.
        samples: sequences per candidate.
        judged: sequences per judgement.
        batch: sequences per model call.
        teacher: how a "teacher" target samples.
        relax: share of redrawn sites of the student's start, for the score objectives.
        holdout: statistics that only judge ("4gram", "lag4", "patch3w8"); None: what fits the sequences.
        folder: where teacher samples and the search's journal are kept; None: nowhere.
        device: where sampling runs.
    """

    budget: int | None = None
    samples: int = 1500
    judged: int = 4000
    batch: int = 500
    teacher: Teacher = field(default_factory=Teacher)
    relax: float = 0.0
    holdout: tuple[str, ...] | None = None
    folder: Path | None = None
    device: str = "cpu"


def fit_discrete_sampler(
    model: Model,
    process: Process,
    seq_len: int,
    nfe: int,
    knobs: Sequence[str] | str = "auto",
    objective: str = "auto",
    target: Tensor | str = "teacher",
    seed: int = 0,
    *,
    base: str | None = None,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
) -> DiscreteTable:
    """Learn the numbers of a few-step sampler of a frozen discrete diffusion model.

    Args:
        model: ``model(x, t) -> D``, as in `samplers.discrete.sample_discrete`.
        process: the noising process.
        seq_len: sequence length L.
        nfe: network evaluations of the learned sampler.
        knobs: subset of t, rate, temp, count, unmask, remask that ``base`` has; "auto" tries the known good families.
        objective: "exact_kl" (enumerates S^L states), "ngram_kl", "mmd", "tv_support" (samples), the papers' "score_l2" (with
            a repaired scale: "score_l2_block"; both experimental), or "auto".
        target: law (V,) * L, ids (n, L), or "teacher": many-step samples of the model itself.
        seed: of everything random.
        base: base transition, when ``knobs`` are named; None: the one the knobs belong to.
        settings: effort, held-out statistics, folder for resuming.
        progress: called with (stage, done, all, value).

    Returns:
        The best table that beats the best plain sampler of the tried families on fresh noise and held-out statistics; if none
        does, that plain sampler. Its provenance names the plain sampler and has the scores of both, ``improves`` and the
        ``reasons`` against. The score objectives always return what they found.

    Warns:
        UserWarning: no learned table may be called an improvement.

    Raises:
        ValueError: names, shapes or sizes that do not fit, before any compute.
    """
    settings, started = settings or FitSettings(), time.monotonic()
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    if seq_len < 1 or nfe < 1:
        raise ValueError(f"seq_len and nfe must be at least 1, got {seq_len} and {nfe}")
    scored = objective.startswith("score_l2")
    exact = objective == "exact_kl" or (objective == "auto" and enumerable(process, seq_len))
    if objective == "exact_kl" and not enumerable(process, seq_len):
        raise ValueError(
            f"exact_kl enumerates states: {process.states}^{seq_len} are too many; use ngram_kl, mmd or tv_support"
        )
    spaces = _spaces(process, nfe, seq_len, knobs, base, exact=exact, scored=scored)
    if settings.holdout is not None:
        check_names(settings.holdout, process.vocab, seq_len)
    say = progress or (lambda *_: None)
    resolved = resolve_target(
        target,
        model,
        process,
        seq_len,
        exact=exact or (scored and enumerable(process, seq_len)),
        teacher=settings.teacher,
        folder=settings.folder,
        batch=settings.batch,
        device=settings.device,
        progress=lambda done, total: say("teacher samples", done, total, 0.0),
    )
    if objective == "auto":
        objective = "exact_kl" if exact else choose_objective(resolved.fit, process.vocab)
    bench = _Bench(model, process, seq_len, resolved, objective, settings, seed)
    fits = [_fit_one(space, bench, say) for space in spaces]
    # the best plain sampler of any family: a table that only beats its own base is no improvement
    plain, before = min(((space.plain, bench.judge(space.plain)) for space in spaces), key=lambda item: item[1]["objective"])
    judged = [(table, after, bench.reasons(before, after)) for table, after in fits]
    table, after, reasons = min(judged, key=lambda item: (len(item[2]) > 0, item[1]["objective"]))
    improves = not reasons
    if not improves:
        warnings.warn(f"no improvement over {plain.transition} at NFE {nfe}: {'; '.join(reasons)}", stacklevel=2)
    provenance: dict[str, Any] = {
        "objective": objective,
        "target": resolved.kind,
        "seed": seed,
        "seq_len": seq_len,
        "model_digest": model_digest(model, process, seq_len),
        "schedule": process.schedule.to_dict(),
        "plain": plain.transition,
        "scores": {"plain": before, "learned": after} | ({"floor": bench.floor} if bench.floor else {}),
        "improves": improves,
        "reasons": reasons,
        "seconds": round(time.monotonic() - started, 1),
    }
    if not improves and not scored:
        provenance["rejected"] = {name: [float(v) for v in values] for name, values in table.learned.items()}
        table = plain
    return DiscreteTable.from_dict(table.to_dict() | {"provenance": provenance | dict(table.provenance)})


def _spaces(
    process: Process, nfe: int, seq_len: int, knobs: Sequence[str] | str, base: str | None, *, exact: bool, scored: bool
) -> list[KnobSpace]:
    """The families to fit."""
    if knobs == "auto" and base is None:
        if scored:
            return [KnobSpace(process.name, "euler", nfe, seq_len, ("rate",))]
        return default_spaces(process.name, nfe, seq_len, sampled=not exact)
    if knobs == "auto":
        raise ValueError(f"name the knobs to learn of {base!r}, or leave base out")
    names = (knobs,) if isinstance(knobs, str) else tuple(knobs)
    if base is None:
        masked = process.name == "masked"
        base = "euler" if "rate" in names else "fixed_count" if "count" in names else "tweedie"
        if masked and not {"rate", "unmask", "count"} & set(names):
            base = "euler" if scored else "fixed_count"
        base = "euler" if scored else base
    return [KnobSpace(process.name, base, nfe, seq_len, names)]


class _Bench:
    """One target and one objective: draws and scores tables on fit noise and on fresh noise."""

    def __init__(
        self, model: Model, process: Process, seq_len: int, target: Target, objective: str, settings: FitSettings, seed: int
    ) -> None:
        self.model, self.process, self.seq_len, self.target = model, process, seq_len, target
        self.objective, self.settings, self.seed = objective, settings, seed
        self.score = self.held_score = self.floor = None
        self.names: tuple[str, ...] = ()
        self.label = ""
        if target.law is None:
            names = settings.holdout or default_holdout(objective, process.vocab, seq_len, len(target.held_out))
            self.names, self.floor = names, floor_scores(target.held_out, names, process.vocab)
        if objective in SAMPLED:
            self.score = statistic(objective, target.fit, process.vocab)
            self.held_score = statistic(objective, target.held_out, process.vocab)
            kind = "+".join(objective_windows(process.vocab, seq_len)) if objective == "ngram_kl" else objective
            data = hashlib.sha256(target.fit.numpy().tobytes()).hexdigest()[:12]
            self.label = f"{kind} of {settings.samples} from {data}, model {model_digest(model, process, seq_len)}"

    def draw(self, table: DiscreteTable, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        args = (self.model, self.process, n, self.seq_len, table, generator)
        return draw_many(*args, self.settings.batch, self.settings.device)

    def judge(self, table: DiscreteTable) -> dict[str, float]:
        """Scores on fresh noise against held-out data, or exact ones."""
        if self.target.law is not None:
            with torch.no_grad():
                scores = exact_scores(self.target.law, push_table(self.model, self.process, self.seq_len, table))
                return {"objective": float(exact_kl(self.model, self.process, self.seq_len, table, self.target.law))} | scores
        ids = self.draw(table, self.settings.judged, 2**31 + self.seed)
        scores = sampled_scores(ids, self.target.held_out, self.names, self.process.vocab)
        value = self.held_score(ids) if self.held_score else next(iter(scores.values()))
        return {"objective": value} | scores

    def reasons(self, plain: dict[str, float], learned: dict[str, float]) -> list[str]:
        """Why a table with these scores is no improvement over a plain sampler with those."""
        found = reasons_against(plain, learned, self.floor)
        if not learned["objective"] < plain["objective"]:
            found.insert(0, "the objective did not improve on fresh noise")
        return found


def _fit_one(space: KnobSpace, bench: _Bench, say: Progress) -> tuple[DiscreteTable, dict[str, float]]:
    """A family's best table and its scores."""
    settings, seed, name = bench.settings, bench.seed, f"{space.base} {'+'.join(space.knobs)}"

    def note(done: int, total: int, value: float) -> None:
        say(name, done, total, value)

    if bench.objective == "exact_kl":
        vector, _ = fit_exact(
            space, bench.model, bench.process, bench.target.law, iterations=settings.budget or 120, progress=note
        )
        table = space.numbers(vector)
    elif bench.objective in SAMPLED:
        file = f"{space.base.partition(':')[0]}-{'-'.join(space.knobs)}-{bench.objective}-{space.nfe}-{seed}.json"
        journal = None if settings.folder is None else settings.folder / file
        vector = fit_sampled(
            space,
            lambda point, noise: bench.draw(space.numbers(point), settings.samples, noise),
            bench.score,
            evaluations=settings.budget or 350,
            seed=seed,
            journal=journal,
            label=bench.label,
            progress=note,
        )
        table = space.numbers(vector)
    else:
        config = ScoreFit(block=bench.objective == "score_l2_block", seed=seed, relax=settings.relax)
        table = fit_score(space, bench.model, bench.process, config, device=settings.device, progress=note)
    return table, bench.judge(table)
