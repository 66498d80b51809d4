"""Corrected sampling for ``fewstep sample``: the options --target, --particles and --pick."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..particles import FeynmanKac

TargetOption = Annotated[
    str | None, typer.Option("--target", help="Law to sample, as in cfg:2.0, with Feynman-Kac corrected particles.")
]
ParticlesOption = Annotated[int, typer.Option("--particles", min=1, help="Particles per image (with --target).")]
PickOption = Annotated[str, typer.Option("--pick", help="Which particle becomes the image: sample (by weight) or max.")]
WEIGHTS, PAGE = "particles.json", "particles.html"
LONG = " (long: weights are taken at its start; add grid=logsnr to the sampler, or evaluations)"


def check(target: str | None, particles: int, pick: str, guidance: float | None) -> FeynmanKac | None:
    """The corrector of the options, or None without --target.

    Raises:
        ValueError: options that contradict each other.
    """
    if pick not in ("sample", "max"):
        raise ValueError(f"--pick {pick!r}: known are sample and max")
    if target is None:
        if particles != 1:
            raise ValueError(f"--particles {particles} needs --target, as in --target cfg:2.0")
        return None
    from ..particles import FeynmanKac, Target

    if guidance is not None:
        raise ValueError(f"--guidance {guidance:g} and --target {target} both say how to guide; leave --guidance out")
    law = Target.parse(target)
    if dict(law.exponents) == {"model": 1.0}:
        raise ValueError(
            f"--target {target} is the model's own law, where particles weigh nothing; tilt it by a reward, in Python "
            "with Target.power(1.0).with_reward(...)"
        )
    return FeynmanKac(law)


class Correction:
    """Runs a pipeline corrected and keeps what the particles did, next to the images."""

    def __init__(self, fk: FeynmanKac, particles: int, pick: str, out: Path) -> None:
        """Write to the folder ``out``."""
        self.fk, self.particles, self.pick, self.out = fk, particles, pick, out
        self.run: Any = None

    def inside(self, pipe: Any) -> AbstractContextManager[None]:
        """The context to run ``pipe`` in."""

        @contextmanager
        def attached() -> Iterator[None]:
            with self.fk.attach(pipe, self.particles, pick=self.pick, expand=True) as self.run:
                yield

        return attached()

    def after(self, batch: range) -> None:
        """Record weights and log Z of a finished batch, and redraw the page from it."""
        from ..particles import trace_page

        path = self.out / WEIGHTS
        record = json.loads(path.read_text()) if path.is_file() else {}
        run, k = self.run, self.particles
        log_w, log_z = run.log_w.reshape(-1, k).tolist(), run.log_z.tolist()
        alive = run.trace.surviving()[-1].tolist()
        for i, row, z, left, kept in zip(batch, log_w, log_z, alive, run.kept.tolist(), strict=True):
            record[str(i)] = {"log_w": row, "log_z": z, "ancestors_left": left, "kept": kept % k}
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(record) + "\n")
        partial.replace(path)
        law = " * ".join(f"{name}^{g:g}" for name, g in self.fk.target.exponents.items())
        facts = {
            "target": law,
            "shown": f"images {batch.start} to {batch.stop - 1}, the last batch; {WEIGHTS} has all",
            **{name: f"{share:.2%}" for name, share in run.approximations.items()},
            "longest step, ln(s / s')": f"{run.longest_step:.2f}" + (LONG if run.longest_step > 0.5 else ""),
        }
        names, pictures = [f"image {i}" for i in batch], [self._picture(i) for i in batch]
        kept = [row % k for row in run.kept.tolist()]
        trace_page(run.trace, self.out / PAGE, names=names, facts=facts, kept=kept, pictures=pictures)

    def _picture(self, number: int) -> Any:
        """The saved image (C, H, W) in [0, 1]."""
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        with Image.open(self.out / f"{number:05d}.png") as image:
            return to_tensor(image)
