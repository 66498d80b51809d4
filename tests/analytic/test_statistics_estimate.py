"""Estimated statistics against closed forms, their files, resuming, and what they do to the first-order error."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from samplers import NoiseSchedule, SolverSchedule, StepStrategy, Tableau, sample
from samplers.denoisers import GaussianMixture, from_network
from samplers.statistics import EmpiricalStatistics

VP = NoiseSchedule.vp_linear()
NOISE = {"vp": VP, "edm": NoiseSchedule.edm(), "flow": NoiseSchedule.flow()}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("derivatives", ["forward", "difference"])
@pytest.mark.parametrize("kind", NOISE)
def test_a_gaussian_has_the_closed_form(kind: str, derivatives: str) -> None:
    """N(m, c^2): l = 1 / (1 + c^2 e^{2 lambda}), f = -l m is the same for every sample, so s is free and b = -l' m."""
    noise, mean, std = NOISE[kind], torch.tensor([[0.7, -0.2, 3.0]]), 0.5
    law = GaussianMixture(mean, torch.tensor([std]))
    found = EmpiricalStatistics.estimate(
        law.denoiser(noise), noise, law.sample(2, _generator()), 100, _generator(), derivatives=derivatives
    )
    signal = std**2 * torch.exp(2 * found.lam)[:, None]
    assert len(found.lam) == 101
    limit = 1e-12 if derivatives == "forward" else 1e-5
    assert (found.l - 1 / (1 + signal)).abs().max() < limit
    if derivatives == "forward":
        assert found.s.abs().max() == 0.0
        assert (found.b - 2 * signal / (1 + signal) ** 2 * mean).abs().max() < 2e-4  # the spline's derivative of l


def test_the_grid_spans_the_noise_schedule() -> None:
    law = GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    for kind, (first, last) in {"vp": (1.0, 1e-3), "edm": (80.0, 0.002), "flow": (None, 1e-3)}.items():
        found = EmpiricalStatistics.estimate(
            law.denoiser(NOISE[kind]), NOISE[kind], law.sample(2, _generator()), 4, _generator()
        )
        start = -7.0 if first is None else NOISE[kind].lam(first).item()
        assert found.lam.tolist() == pytest.approx(np.linspace(start, NOISE[kind].lam(last).item(), 5).tolist(), abs=1e-12)
    some = EmpiricalStatistics.estimate(law.denoiser(VP), VP, law.sample(2, _generator()), 4, t_start=0.5, t_end=0.1)
    assert [some.lam[0].item(), some.lam[-1].item()] == pytest.approx(VP.lam(torch.tensor([0.5, 0.1])).tolist())


def _mixture_by_quadrature(law: GaussianMixture, lam: float) -> tuple[float, float, float]:
    """(l, s, b) of a one-dimensional mixture from the definitions in the noise prediction, integrated over y = x / alpha."""
    means, variances = law.means[:, 0].numpy(), law.variances[:, 0].numpy()
    weights = law.weights.numpy()
    h = 1e-4

    def density(y, at):
        v = variances + np.exp(-2 * at)
        parts = weights * np.exp(-((y[:, None] - means) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
        return parts, v

    def eps(y, at):  # -sigma grad log p of x, in the frame y
        parts, v = density(y, at)
        return np.exp(-at) * ((parts * (y[:, None] - means) / v).sum(1) / parts.sum(1))

    width = 8 * np.sqrt(variances.max() + np.exp(-2 * lam))
    y = np.linspace(means.min() - width, means.max() + width, 20001)

    def slope(at):  # E[sigma d eps / dx] = e^{-lambda} E[d eps / dy]
        p = density(y, at)[0].sum(1)
        return np.trapezoid(p * np.exp(-at) * (eps(y + h, at) - eps(y - h, at)) / (2 * h), y)

    l, rate, noise = slope(lam), (slope(lam + h) - slope(lam - h)) / (2 * h), eps(y, lam)
    velocity = -np.exp(-lam) * noise  # dy / dlambda
    along = (eps(y + h * velocity, lam + h) - eps(y - h * velocity, lam - h)) / (2 * h)
    f = np.exp(-lam) * noise - l * y
    f1 = np.exp(-lam) * (along - noise) - rate * y - l * velocity
    p = density(y, lam)[0].sum(1)

    def mean(values):
        return np.trapezoid(p * values, y)

    s = (mean(f * f1) - mean(f) * mean(f1)) / (mean(f * f) - mean(f) ** 2)
    return l, s, mean(f1) - s * mean(f)


def test_a_mixture_has_the_closed_form() -> None:
    """Within sampling error: limits are four standard deviations, measured over seeds."""
    law = GaussianMixture(torch.tensor([[-1.0], [0.4], [1.5]]), torch.tensor([0.2, 0.4, 0.1]), torch.tensor([0.5, 0.3, 0.2]))
    data = law.sample(6000, _generator())
    found = EmpiricalStatistics.estimate(law.denoiser(VP), VP, data, 48, _generator(1), batch_size=6000)
    for k in range(4, 48, 5):
        l, s, b = _mixture_by_quadrature(law, found.lam[k].item())
        assert found.l[k].item() == pytest.approx(l, abs=0.02)
        assert found.s[k].item() == pytest.approx(s, abs=0.1)
        assert found.b[k].item() == pytest.approx(b, abs=0.02)


# ---- what they are good for ------------------------------------------------------------------------------------------------


def _grid(steps: int) -> tuple[float, ...]:
    ends = VP.lam(torch.tensor([1.0, 1e-3])).tolist()
    return tuple(VP.t_of_lam(torch.linspace(*ends, steps + 1, dtype=torch.float64)).tolist())


def _mixture() -> GaussianMixture:
    generator = _generator(3)
    return GaussianMixture(torch.randn(5, 24, generator=generator).double(), torch.rand(5, generator=generator) * 0.3 + 0.1)


@pytest.mark.slow
def test_the_first_order_error_drops_on_held_out_noise() -> None:
    """By a factor of about 1.5 at 5 NFE and 1.6 to 2.1 at 8 to 40; with one number per node of 1.1 to 1.5."""
    law, data = _mixture(), _mixture().sample(1024, _generator())
    denoiser, x = law.denoiser(VP), torch.randn(512, 24, dtype=torch.float64, generator=_generator(7))

    def plan(pred: str, order: int, steps: int) -> SolverSchedule:
        chosen = tuple(StepStrategy(order=min(order, i + 1), pred=pred) for i in range(steps))
        return SolverSchedule(times=_grid(steps), steps=chosen)

    full = EmpiricalStatistics.estimate(denoiser, VP, data, 120, _generator(1), batch_size=512)
    small = EmpiricalStatistics.estimate(denoiser, VP, data, 120, _generator(1), batch_size=512, pool="all")
    exact = sample(denoiser, x, plan("x0", 3, 400), VP)

    def error(schedule: SolverSchedule, statistics: EmpiricalStatistics | None = None) -> float:
        found = sample(denoiser, x, schedule, VP, statistics=statistics)
        return (found - exact).square().mean(1).sqrt().mean().item()

    for steps, least in ((5, 1.3), (8, 1.4), (10, 1.4), (20, 1.4), (40, 1.4)):
        ddim = error(plan("x0", 1, steps))
        assert ddim / error(plan("v3", 1, steps), full) > least, steps
        assert ddim / error(small.embed(plan("v3", 1, steps))) > 1.02, steps


# ---- how they are gathered -------------------------------------------------------------------------------------------------

LAW = GaussianMixture(torch.tensor([[-1.0, 0.5], [0.4, 1.0]]), torch.tensor([0.2, 0.4]))
DATA = LAW.sample(12, _generator())


def _estimate(data=DATA, nodes: int = 5, **options) -> EmpiricalStatistics:
    return EmpiricalStatistics.estimate(LAW.denoiser(VP), VP, data, nodes, _generator(1), **{"batch_size": 4, **options})


def _same(a: EmpiricalStatistics, b: EmpiricalStatistics) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("lam", "l", "s", "b"))


def test_batches_may_be_streamed() -> None:
    assert _same(_estimate(), _estimate(iter(DATA.split(4))))
    assert not _same(_estimate(), EmpiricalStatistics.estimate(LAW.denoiser(VP), VP, DATA, 5, _generator(2), batch_size=4))
    assert _estimate().provenance["samples"] == 12


def test_progress_counts_nodes() -> None:
    seen: list[tuple[int, int | None]] = []
    _estimate(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 18) for k in range(1, 19)]
    seen.clear()
    _estimate(iter(DATA.split(6)), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, None)


@pytest.mark.parametrize("stop", [7, 13])
def test_an_interrupted_estimate_resumes_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "moments.safetensors"

    def interrupt(done: int, total: int | None) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _estimate(checkpoint=checkpoint, progress=interrupt)
    assert checkpoint.is_file()
    done: list[int] = []
    # another generator: the run's own seed is in the checkpoint
    resumed = EmpiricalStatistics.estimate(
        LAW.denoiser(VP), VP, DATA, 5, _generator(9), batch_size=4, checkpoint=checkpoint, progress=lambda n, _: done.append(n)
    )
    assert done[0] == 6 * (stop // 6) + 1
    assert _same(resumed, _estimate())
    with pytest.raises(ValueError, match=r'made with .*"nodes": 5.* now .*"nodes": 6.*choose another file'):
        _estimate(nodes=6, checkpoint=checkpoint)
    _estimate().save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not the checkpoint of an estimate"):
        _estimate(checkpoint=tmp_path / "other.safetensors")


def test_pooling_fits_one_line_for_all_elements() -> None:
    images = torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=_generator())
    law = GaussianMixture(torch.zeros(1, 12), torch.full((1,), 0.7))

    def run(pool: str) -> EmpiricalStatistics:
        return EmpiricalStatistics.estimate(law.denoiser(VP), VP, images, 4, _generator(1), pool=pool)

    assert run("none").l.shape == (5, 3, 2, 2)
    assert run("channels").l.shape == (5, 3, 1, 1)
    assert run("all").l.shape == (5,)
    assert torch.allclose(run("all").l, run("none").l.mean((1, 2, 3)))


def test_a_float32_network_in_both_ways() -> None:
    torch.manual_seed(0)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
            return (torch.tanh(self.conv(F.group_norm(x, 1)) + t / 1000) + 0.3 * x,)

    noise = NoiseSchedule.vp_discrete((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    images, denoiser = torch.randn(4, 2, 4, 4, generator=_generator()), from_network(Network(), noise)
    a, b = (
        EmpiricalStatistics.estimate(denoiser, noise, images, 8, _generator(1), derivatives=how, t_end=0.05)
        for how in ("forward", "difference")
    )
    assert a.l.dtype == torch.float64
    assert torch.allclose(a.l, b.l, atol=2e-3)
    again = EmpiricalStatistics.estimate(denoiser, noise, images.double(), 8, _generator(1), probes=16, t_end=0.05)
    assert torch.isfinite(again.s).all()


def test_a_network_without_forward_mode_is_named() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0.5

        @staticmethod
        def backward(ctx, grad):
            return grad * 0.5

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return Backward.apply(x)

    with pytest.raises(RuntimeError, match=r"without forward-mode derivatives .*use derivatives='difference'"):
        EmpiricalStatistics.estimate(denoiser, VP, DATA, 4, _generator())
    found = EmpiricalStatistics.estimate(denoiser, VP, DATA, 4, _generator(), derivatives="difference")
    assert torch.allclose(found.l, 1 - 0.5 * VP.alpha(VP.t_of_lam(found.lam))[:, None].expand(-1, 2), atol=1e-8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nodes": 1}, "nodes must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size and probes must be at least 1, got 0 and 1"),
        ({"pool": "pixels"}, "unknown pool 'pixels'; known: none, channels, all"),
        ({"pool": "channels"}, "needs samples with a channel axis"),
        ({"derivatives": "reverse"}, "unknown derivatives 'reverse'; known: forward, difference"),
        ({"t_start": 0.1, "t_end": 0.2}, "must enclose finite lambda"),
        ({"data": torch.ones(3, 2, dtype=torch.int64)}, r"floating-point tensors .* got \(3, 2\) torch.int64"),
        ({"data": iter([])}, "holds no samples"),
        ({"data": iter([DATA, DATA[:, :1]])}, r"samples of shape \(1,\) after ones of \(2,\)|values per sample"),
    ],
)
def test_bad_requests_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _estimate(**options)


# ---- as data ---------------------------------------------------------------------------------------------------------------


def test_files_give_the_same_bits_back(tmp_path: Path) -> None:
    found, path = _estimate(), tmp_path / "statistics.safetensors"
    found.save(path)
    again = EmpiricalStatistics.load(path)
    assert _same(again, found)
    assert again.provenance == found.provenance
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of empirical model statistics"):
        EmpiricalStatistics.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        EmpiricalStatistics.load(tmp_path / "text")
    _estimate(checkpoint=tmp_path / "moments")
    with pytest.raises(ValueError, match="no b, l, lam, s among its tensors"):
        EmpiricalStatistics.load(tmp_path / "moments")


def test_published_pairs_of_npz_are_read(tmp_path: Path) -> None:
    l, s, b = (np.random.default_rng(i).normal(size=(13, 3, 2, 2)).astype(np.float32) for i in range(3))
    np.savez(tmp_path / "l.npz", l=l)
    with pytest.raises(FileNotFoundError, match=r"sb\.npz: no such file"):
        EmpiricalStatistics.from_npz(tmp_path, VP, t_end=1e-4)
    np.savez(tmp_path / "sb.npz", s=s, b=b)
    found = EmpiricalStatistics.from_npz(tmp_path, VP, t_end=1e-4)
    assert [found.l.numpy().tolist(), found.s.numpy().tolist(), found.b.numpy().tolist()] == [v.tolist() for v in (l, s, b)]
    assert found.lam[[0, -1]].tolist() == pytest.approx(VP.lam(torch.tensor([1.0, 1e-4], dtype=torch.float64)).tolist())
    np.savez(tmp_path / "sb.npz", s=s)
    with pytest.raises(ValueError, match=r"sb\.npz: not an archive with s and b"):
        EmpiricalStatistics.from_npz(tmp_path, VP, t_end=1e-4)
    np.savez(tmp_path / "sb.npz", s=np.array([print], dtype=object), b=b)  # would need pickle
    with pytest.raises(ValueError, match=r"sb\.npz: not an archive"):
        EmpiricalStatistics.from_npz(tmp_path, VP, t_end=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lam": torch.tensor([0.0, 1.0, 3.0])}, "lam must increase by equal steps"),
        ({"lam": torch.tensor([2.0, 1.0, 0.0])}, "lam must increase by equal steps"),
        ({"lam": torch.tensor([0.0])}, r"lam must have shape \(n \+ 1,\)"),
        ({"s": torch.zeros(3, 1)}, r"s must have shape \(3, 2\), .* got \(3, 1\)"),
        ({"l": torch.zeros(4, 2)}, r"l must have shape \(3, '...'\)"),
        ({"b": torch.full((3, 2), torch.nan)}, "b holds values that are not finite"),
    ],
)
def test_what_is_no_grid_of_statistics_is_refused(change: dict, reason: str) -> None:
    good = {"lam": torch.tensor([0.0, 1.0, 2.0]), "l": torch.zeros(3, 2), "s": torch.zeros(3, 2), "b": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=reason):
        EmpiricalStatistics(**{**good, **change})


def test_scalar_statistics_travel_inside_a_schedule(tmp_path: Path) -> None:
    small = _estimate(pool="all", nodes=20)
    plan = SolverSchedule(times=(0.9, 0.5, 0.1), steps=(StepStrategy(pred="v3"), StepStrategy(pred="v3", order=2)))
    inside = small.embed(plan)
    inside.save(tmp_path / "plan.json")
    again = SolverSchedule.load(tmp_path / "plan.json")
    assert again == inside
    assert again.digest == inside.digest != plan.digest
    x, denoiser = torch.randn(3, 2, dtype=torch.float64, generator=_generator()), LAW.denoiser(VP)
    expected = sample(denoiser, x, plan, VP, statistics=small)
    assert torch.allclose(sample(denoiser, x, again, VP), expected, rtol=1e-13)
    other = EmpiricalStatistics(small.lam, torch.ones(21), torch.zeros(21), torch.zeros(21))
    assert torch.equal(sample(denoiser, x, again, VP, statistics=other), sample(denoiser, x, plan, VP, statistics=other))
    with pytest.raises(ValueError, match="only one number per node fits into a schedule"):
        _estimate().embed(plan)
    broken = json.loads((tmp_path / "plan.json").read_text())
    broken["statistics"]["l"] = [1.0]
    with pytest.raises(ValueError, match="one number per node, at least two, got 1, 21 and 21"):
        SolverSchedule.from_dict(broken)
    assert EmpiricalStatistics.of(plan) is None
    assert Tableau.build(again, VP).nfe == 2
