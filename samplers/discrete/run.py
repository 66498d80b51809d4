"""What a discrete sampler does at run time: walks a table by ask/tell, so the loop and a diffusers scheduler share it.

The whole protocol: ``while run.query is not None: run.tell(model(run.x, run.query))``, then ``run.x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .kernels import draw, nucleus, sharpen, uniform
from .processes import MaskedProcess, Process
from .selection import by_confidence, first_hit, reveal_random, to_reveal
from .survival import as_float64
from .table import DiscreteTable
from .transitions import Step, Transition, second_rows, transition, trial_rows, trial_time

Model = Callable[[Tensor, Tensor], Tensor]


def table_steps(table: DiscreteTable) -> list[Step]:
    """The steps of a table, with every knob's number."""
    count, steps, heat = table.steps, [], transition(table.transition).parameters["temperature"]
    total = None if table.count is None else sum(table.count)
    shown = 0.0
    for k in range(count):
        if total is not None:
            shown = shown + table.count[k] / total
        steps.append(
            Step(
                index=k,
                steps=count,
                t=table.times[k],
                s=table.times[k + 1],
                rate=table.knob("rate", k, 1.0),
                temp=table.knob("temp", k, 1.0) if heat == 1.0 else table.knob("temp", k, 1.0) / heat,
                unmask=table.knob("unmask", k, None),
                remask=table.knob("remask", k, 0.0),
                target=None if total is None else 1.0 if k == count - 1 else shown,
            )
        )
    return steps


def neutral(value: float | Tensor, number: float) -> bool:
    """Whether a knob is a plain number that changes nothing; tensors (being fitted) always act."""
    return not torch.is_tensor(value) and value == number


class DiscreteRun:
    """One run of a table over a batch.

    Attributes:
        x: ids (B, L) to evaluate the model at; the result at the end.
        position: model evaluations answered so far.
        frozen: (B, L) sites that never change: given tokens, and whatever the caller marks.
    """

    def __init__(
        self,
        table: DiscreteTable,
        process: Process,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        frozen: Tensor | None = None,
    ) -> None:
        """Start at ids ``x`` (B, L); under masked noise, tokens that are not masked now are given and stay.

        Raises:
            ValueError: the table is for another process, or first_hitting has fewer steps than masked sites.
        """
        if table.process != process.name:
            raise ValueError(f"the table is for the {table.process} process, the model's is {process.name}")
        self.base, self.process, self.x, self.generator = transition(table.transition), process, x, generator
        self.position, self._stages, self._kept = 0, _stages(self.base, table_steps(table)), ()
        self.frozen = torch.zeros_like(x, dtype=torch.bool) if frozen is None else frozen
        if isinstance(process, MaskedProcess):
            self.frozen = self.frozen | (x != process.mask_id)
        self.open = (~self.frozen).sum(-1)  # (B,) sites to fill
        if self.base.kind == "first_hitting":
            if len(self._stages) < int(self.open.max()):
                needed = int(self.open.max())
                raise ValueError(f"first_hitting reveals one token per evaluation: it needs nfe = {needed}, got {table.nfe}")
            self._hit(as_float64(table.times[0]).expand(len(x)).to(x.device))

    @property
    def query(self) -> Tensor | None:
        """Time of the model evaluation that is due, 0-d or (B,) float64; None at the end."""
        if self.position >= len(self._stages):
            return None
        if self.base.kind == "first_hitting":
            return self._kept[1]
        step, stage = self._stages[self.position]
        return as_float64(trial_time(self.base, step) if self._kept or stage == "second" else step.t)

    @property
    def step(self) -> Step:
        """The step that is due."""
        return self._stages[self.position][0]

    def join(self, position: int) -> None:
        """Skip to a later query: the state is taken as one that the run reached on its own.

        Raises:
            ValueError: the query is the second half of a step, or its time depends on the run so far.
        """
        if position and (self.base.kind == "first_hitting" or self._stages[position][1] in ("second", "finish")):
            finishing = self._stages[position][1] == "finish" and self.base.kind != "two_stage"
            if not finishing:
                raise ValueError(f"a run of {self.base.name} cannot be joined at its query {position}")
        self.position = position
        if position and self.base.kind in ("count", "confidence"):  # the sites that were open at the very start
            target = self.step.target
            before = position / len(self._stages) if target is None else self._stages[position - 1][0].target
            self.open = (self.open / max(1e-9, 1.0 - float(before))).round().long()

    def _hit(self, clock: Tensor) -> None:
        self._kept = first_hit(self.process, clock, self.x, self.generator)

    def tell(self, probs: Tensor, x: Tensor | None = None, *, tempered: bool = False) -> None:
        """Take the posterior (B, L, V) for the due query and move on.

        Args:
            probs: the model's posterior at `x` and `query`.
            x: the state it was made at, where the caller may have changed it since.
            tempered: the step's exponent (``step.temp``) is already in ``probs``.

        Raises:
            RuntimeError: no query is due.
            ValueError: ``probs`` has the wrong shape.
        """
        if self.position >= len(self._stages):
            raise RuntimeError(f"all {len(self._stages)} model evaluations are done; start a new run")
        x = self.x if x is None else x
        if probs.shape != (*x.shape, self.process.vocab):
            wanted = (*x.shape, self.process.vocab)
            raise ValueError(f"the model returned shape {tuple(probs.shape)}, expected probabilities of shape {wanted}")
        step, stage = self._stages[self.position]
        probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
        probs = self.process.settle(shaped(probs, 1.0 if tempered else step.temp, self.base.parameters["top_p"]), x)
        self.x = torch.where(self.frozen, x, self._next(probs, x, step, stage))
        if stage != "trial" and not neutral(step.remask, 0.0) and not step.last:
            again = (uniform(self.x.shape, probs, self.generator) < step.remask) & ~self.frozen
            self.x = torch.where(again, self.process.mask_id, self.x)
        self.position += 1
        if self.base.kind == "first_hitting":
            self._hit(self._kept[1])
        if self.base.name == "entropy_bound" and not bool((self.x == self.process.mask_id).any()):
            self.position = len(self._stages)  # it reveals as many as it dares, and may be done early

    def select(self, index: Tensor) -> None:
        """Permute or duplicate samples: everything remembered follows ``index`` (B',) along the batch."""
        self.x, self.frozen, self.open = self.x[index], self.frozen[index], self.open[index]
        self._kept = tuple(part[index] for part in self._kept)

    def _next(self, probs: Tensor, x: Tensor, step: Step, stage: str) -> Tensor:
        process, kind, generator = self.process, self.base.kind, self.generator
        if kind == "first_hitting":
            return torch.where(self._kept[0], draw(probs, generator), x)
        if kind in ("count", "confidence"):
            wanted = to_reveal(x == process.mask_id, self.open, step, generator)
            if kind == "count":
                return reveal_random(process, probs, x, wanted, generator)
            heat = self.base.parameters["noise"] * (1.0 - (step.index + 1) / step.steps)
            return by_confidence(process, probs, x, wanted, heat, generator)
        if stage == "finish":
            return draw(process.finish(probs, x), generator)
        if stage == "only":
            return draw(self.base.rows(process, probs, x, step, self.base.parameters), generator)
        rates = process.reverse_rates(probs, x, self.query) * step.rate
        if stage == "trial":
            self._kept = (x, rates)
            return draw(trial_rows(self.base, rates, x, step), generator)
        start, before = self._kept
        self._kept = ()
        return draw(second_rows(self.base, before, rates, start, x, step), generator)


def _stages(base: Transition, steps: list[Step]) -> list[tuple[Step, str]]:
    """One entry per model evaluation: the step it serves, and what happens with the answer."""
    if base.kind != "two_stage":
        return [(step, "finish" if step.last else "only") for step in steps]
    stages = [(step, stage) for step in steps[:-1] for stage in ("trial", "second")]
    if base.parameters["last"] == 2:
        stages.append((steps[-1], "trial"))
    return [*stages, (steps[-1], "finish")]


def shaped(probs: Tensor, temp: float | Tensor, top_p: float) -> Tensor:
    """The posterior after the temperature and truncation of a step."""
    if not neutral(temp, 1.0):
        probs = sharpen(probs, temp)
    return probs if top_p == 1.0 else nucleus(probs, top_p)


def plan(process: Process, nfe: int | None, base: str, table: DiscreteTable | None, grid: str = "uniform") -> DiscreteTable:
    """The table a sampling call means: ``table`` itself, or the plain one of a transition and NFE.

    Raises:
        ValueError: neither, or an ``nfe`` that is not the table's.
    """
    if table is None:
        if nfe is None:
            raise ValueError("give nfe, or a table")
        return DiscreteTable.plain(process.name, base, nfe, grid)
    table.validate()
    if nfe is not None and nfe != table.nfe:
        raise ValueError(
            f"the table makes {table.nfe} network evaluations, nfe asks for {nfe}: leave nfe out or fit another table"
        )
    return table


def ask(model: Model, run: DiscreteRun) -> None:
    """Answer the due query. A model that can put an exponent into its logits does so: that costs next to nothing."""
    exponent, tempered = run.step.temp, getattr(model, "tempered", None)
    if tempered is None or neutral(exponent, 1.0):
        run.tell(model(run.x, run.query))
    else:
        run.tell(tempered(run.x, run.query, exponent), tempered=True)


def iterate_discrete(
    model: Model,
    process: Process,
    x: Tensor,
    table: DiscreteTable,
    *,
    generator: torch.Generator | None = None,
    frozen: Tensor | None = None,
) -> Iterator[DiscreteRun]:
    """Run a table from ids ``x`` (B, L), yielding the run before the first evaluation and after every answer."""
    run = DiscreteRun(table, process, x, generator=generator, frozen=frozen)
    yield run
    while run.query is not None:
        ask(model, run)
        yield run


def sample_discrete(
    model: Model,
    process: Process,
    shape: tuple[int, int],
    nfe: int | None = None,
    transition: str = "tweedie",
    table: DiscreteTable | None = None,
    *,
    grid: str = "uniform",
    generator: torch.Generator | None = None,
    prompt: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Sample token sequences.

    Args:
        model: ``model(x, t) -> D`` from ids (B, L) and a float64 time, 0-d or (B,), to probabilities (B, L, V).
        process: the noising process the model was made for.
        shape: (n, L).
        nfe: network evaluations; with a ``table`` it must be the table's, or left out.
        transition: text of the transition, as in `samplers.discrete.transition`.
        table: a learned sampler; overrides ``transition`` and ``grid``.
        grid: named time grid of a plain sampler.
        generator: source of all randomness.
        prompt: ids (n, L) or (L,); sites that hold -1 are sampled, all others stay as given.
        device: where the ids live; the prompt's place by default, else the CPU.

    Returns:
        Ids (n, L) int64 in 0 .. V-1.

    Raises:
        ValueError: bad sizes, names or tables, before any model evaluation.
    """
    n, length = shape
    if n < 1 or length < 1:
        raise ValueError(f"shape must be (n, L) with n, L >= 1, got {tuple(shape)}")
    chosen = plan(process, nfe, transition, table, grid)
    place = torch.device(device) if device is not None else prompt.device if prompt is not None else torch.device("cpu")
    x, frozen = process.prior((n, length), generator, device=place), None
    if prompt is not None:
        given = prompt.to(place).expand(n, length)
        if int(given.min()) < -1 or int(given.max()) >= process.vocab:
            raise ValueError(f"prompt ids must be -1 (open) or 0 .. {process.vocab - 1}")
        frozen = given >= 0
        x = torch.where(frozen, given, x)
    run = DiscreteRun(chosen, process, x, generator=generator, frozen=frozen)
    while run.query is not None:
        ask(model, run)
    return run.x
