"""Correctors on exact models: weighted particles against quadrature, and the mistakes that quadrature sees."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import GaussianMixture
from samplers.particles import Cloud, FeynmanKac, Target, native

VP = NoiseSchedule.vp_linear()
END = 1e-3
MODELS = {
    "uncond": GaussianMixture(
        torch.tensor([[-2.0], [0.0], [2.0]]), torch.tensor([0.63, 0.71, 0.63]), torch.tensor([8.0, 7, 5])
    ),
    "cond": GaussianMixture(torch.tensor([[1.6], [-1.8]]), torch.tensor([0.45, 0.5]), torch.tensor([0.8, 0.2])),
}
EDGES = torch.linspace(-6, 6, 61, dtype=torch.float64)
FINE = torch.linspace(-12, 12, 24001, dtype=torch.float64)
Gen = Callable[..., torch.Generator]
Run = Callable[..., Cloud]


def grid(steps: int, schedule: NoiseSchedule = VP) -> Tensor:
    """Uniform in log SNR."""
    return schedule.t_of_lam(torch.linspace(float(VP.lam(1.0)), float(VP.lam(END)), steps + 1, dtype=torch.float64))


def sample(target: Target, steps: int = 100, particles: int = 4000, groups: int = 3, **settings: Any) -> Cloud:
    g = torch.Generator().manual_seed(settings.pop("seed", 0))
    models = {name: MODELS[name].denoiser(VP) for name in target.exponents}
    fk = FeynmanKac(target, **settings)
    return fk.sample(models, VP, grid(steps), particles=particles, shape=(1,), groups=groups, generator=g, dtype=torch.float64)


def exact(target: Target, reward: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, float]:
    """Bin masses and log Z of the target at the last time."""
    alpha, sigma = VP.alpha_sigma(END)
    g = target.at(END)
    log_p = sum(w * MODELS[n].log_prob(FINE[:, None], alpha, sigma) for w, n in zip(g, target.branches, strict=True))
    log_p = log_p if reward is None else log_p + reward(FINE)
    return binned(FINE, log_p.softmax(0)), float(log_p.logsumexp(0) + (FINE[1] - FINE[0]).log())


def binned(x: Tensor, w: Tensor) -> Tensor:
    place = (torch.bucketize(x, EDGES) - 1).clamp(0, len(EDGES) - 2)
    return torch.zeros(len(EDGES) - 1, dtype=torch.float64).scatter_add(0, place, w)


def errors(cloud: Cloud, truth: tuple[Tensor, float]) -> tuple[float, float, float]:
    """Mean total variation over groups; mean error of log Z and its standard deviation over groups."""
    tv = [0.5 * (binned(x[:, 0], w) - truth[0]).abs().sum() for x, w in zip(cloud.x, cloud.w, strict=True)]
    off = cloud.log_z - truth[1]
    return float(torch.stack(tv).mean()), float(off.mean()), float(off.std())


CASES = {
    "guidance 3": (Target.cfg(3.0), {}),
    "guidance 1.5": (Target.cfg(1.5), {}),
    "geometric mean": (Target.cfg(0.5), {}),
    "product": (Target.product("uncond", "cond"), {}),
    "annealed 0.5": (Target({"uncond": 0.5}), {}),
    "annealed 2, extra noise": (Target({"uncond": 2.0}), {"noise": 1.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_laws_and_normalisers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, settings = CASES[name]
    truth = exact(target)
    tv, off, spread = errors(sample(target, **settings), truth)
    plain, _, _ = errors(sample(target, weight_window=(0, 0), **settings), truth)
    assert abs(off) < 3 * spread / 3**0.5 + 0.1
    assert tv < 0.75 * plain
    assert tv < 0.08
    original = native.log_interval
    for factor in (-1.0, 2.0, 0.5):
        monkeypatch.setattr(native, "log_interval", lambda a, b, f=factor: f * original(a, b))
        wrong_tv, wrong_off, wrong_spread = errors(sample(target, **settings), truth)
        # log Z sees what total variation misses, a factor of a half on a mild target
        assert wrong_tv > 1.5 * tv or abs(wrong_off) > 3 * wrong_spread / 3**0.5 + 0.1


@pytest.mark.parametrize("scheme", ["ssp", "killing", "residual"])
def test_other_schemes_reach_the_same_law(scheme: str) -> None:
    truth = exact(Target.cfg(2.0))
    tv, off, _ = errors(sample(Target.cfg(2.0), steps=40, particles=1000, resampling=scheme), truth)
    assert tv < 0.13
    assert abs(off) < 0.15


def test_birth_death_at_every_step() -> None:
    truth = exact(Target.cfg(2.0))
    tv, _, _ = errors(sample(Target.cfg(2.0), steps=100, particles=1000, resampling="birth_death", ess=1.0), truth)
    assert tv < 0.13


@pytest.mark.parametrize("form", ["difference", "max", "add", "gradient"])
def test_rewards_tilt_the_law(form: str) -> None:
    target = Target({"uncond": 1.0})
    # what "max" and "add" pull adds up over the evaluations on the way: few of them
    how = {"gradient": True} if form == "gradient" else {"potential": form, "every": 1 if form == "difference" else 20}
    scale = 1.0
    truth = exact(target, lambda x: scale * x)
    tilted = target.with_reward(lambda x: x[:, 0], scale, **how)
    tv, off, _ = errors(sample(tilted, steps=60, particles=1500), truth)
    assert abs(off) < 0.15
    assert tv < 0.13
    untilted = errors(sample(target, steps=60, particles=1500), truth)
    assert untilted[0] > 0.2


@pytest.mark.slow
def test_guidance_with_a_reward_and_annealing() -> None:
    target = Target.guided_power(1.5, 1.3)
    truth = exact(target, lambda x: -0.5 * (x - 1) ** 2)
    cloud = sample(target.with_reward(lambda x: -0.5 * (x[:, 0] - 1) ** 2), steps=150, particles=4000)
    tv, off, spread = errors(cloud, truth)
    assert tv < 0.08
    assert abs(off) < 3 * spread / 3**0.5 + 0.12


@pytest.mark.slow
def test_guidance_interval_is_paid_for() -> None:
    """Guidance switched off before the end: what is left is the conditional law, whatever went before."""
    target = Target.cfg(3.0, interval=(0.3, 1.0))
    truth = exact(Target.cfg(1.0))
    tv, off, _ = errors(sample(target, steps=150), truth)
    assert tv < 0.12
    assert abs(off) < 0.3


@pytest.mark.slow
def test_more_particles_are_closer(generator: Gen) -> None:
    """One particle drawn from each of many groups."""
    truth, distances = exact(Target.cfg(2.0))[0], []
    for k in (1, 4, 32):
        cloud = sample(Target.cfg(2.0), steps=100, particles=k, groups=4000)
        x = cloud.pick("sample", generator())[:, 0]
        distances.append(float(0.5 * (binned(x, torch.full((4000,), 1 / 4000).double()) - truth).abs().sum()))
    assert distances[2] < 0.85 * distances[1] < 0.85**2 * distances[0]


@pytest.mark.parametrize("schedule", [NoiseSchedule.edm(1e-4, 200.0), NoiseSchedule.flow()])
@pytest.mark.parametrize("target", [Target.cfg(2.0), Target({"uncond": 2.0})])
def test_noise_schedules_agree(schedule: NoiseSchedule, target: Target) -> None:
    """The same path in other coordinates: x / alpha and log Z + d (G - 1) log alpha do not depend on them."""
    results = []
    for ns in (VP, schedule):
        models = {name: MODELS[name].denoiser(ns) for name in target.exponents}
        g = torch.Generator().manual_seed(0)
        times = grid(20, ns)
        cloud = FeynmanKac(target).sample(models, ns, times, particles=50, shape=(1,), generator=g, dtype=torch.float64)
        alpha = ns.alpha(times[-1])
        results.append((cloud.x / alpha, cloud.log_z + (sum(target.at(0.0)) - 1) * alpha.log()))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)


def test_flow_starts_at_pure_noise(generator: Gen) -> None:
    ns = NoiseSchedule.flow()
    models = {name: model.denoiser(ns) for name, model in MODELS.items()}
    times = torch.cat([torch.ones(1), grid(60, ns)[10:]]).double()
    fk = FeynmanKac(Target.cfg(2.0))
    cloud = fk.sample(models, ns, times, particles=2000, shape=(1,), generator=generator(), dtype=torch.float64)
    assert float(cloud.log_z) == pytest.approx(exact(Target.cfg(2.0))[1], abs=0.15)
    with pytest.raises(ValueError, match="sum 2 cannot start at pure noise"):
        FeynmanKac(Target({"uncond": 2.0})).sample(
            {"uncond": models["uncond"]}, ns, times, particles=2, shape=(1,), generator=generator()
        )


def test_gaussian_normaliser_in_many_dimensions(generator: Gen) -> None:
    """A Gaussian's square in 5 dimensions: log Z in closed form."""
    d, ns = 5, NoiseSchedule.edm(0.01, 20.0)
    model = GaussianMixture(torch.zeros(1, d), torch.ones(1))
    times = torch.logspace(math.log10(20), -1, 151, dtype=torch.float64)
    cloud = FeynmanKac(Target.power(2.0), noise=1.0).sample(
        {"model": model.denoiser(ns)}, ns, times, particles=3000, shape=(d,), generator=generator(), dtype=torch.float64
    )
    variance = 1 + 0.1**2
    assert float(cloud.log_z) == pytest.approx(-0.5 * d * (math.log(2 * math.pi * variance) + math.log(2)), abs=0.35)
    spread = float((cloud.w[:, None] * cloud.x**2).sum(0).mean())
    assert spread == pytest.approx(variance / 2, rel=0.15)


# ---- behaviour -------------------------------------------------------------------------------------------------------------


def test_a_plain_target_never_resamples() -> None:
    cloud = sample(Target.cfg(1.0), steps=10, particles=8)
    assert not torch.stack(cloud.trace.resampled).any()
    assert bool((cloud.log_w == 0).all())
    assert bool((cloud.log_z == 0).all())


def test_same_seed_same_cloud_and_shapes() -> None:
    first, second = (sample(Target.cfg(3.0), steps=12, particles=6, groups=2) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.x.shape == (2, 6, 1)
    assert first.ess.shape == (12, 2)
    assert first.ancestors.shape == (12, 2, 6)
    single = sample(Target.cfg(3.0), steps=12, particles=6, groups=None)
    assert single.x.shape == (6, 1)
    assert single.ess.shape == (12,)
    assert single.log_z.shape == ()
    assert first.nfe == 24
    assert first.trace.roots().shape == (12, 2, 6)


def test_windows() -> None:
    cloud = sample(Target.cfg(3.0), steps=20, particles=64, ess=1.0, resample_window=(0.25, 0.5))
    happened = torch.stack(cloud.trace.resampled).any(-1)
    assert not happened[:5].any()
    assert happened[5:10].all()
    assert not happened[10:].any()
    never = sample(Target.cfg(3.0), steps=20, particles=64, resample_window=(0, 0))
    assert not torch.stack(never.trace.resampled).any()
    assert bool((never.log_w != 0).any())


def test_approximations_are_reported() -> None:
    plain = sample(Target.cfg(3.0), steps=20, particles=64)
    assert plain.trace.applied() == 1.0
    assert plain.trace.clipped_share() == 0.0
    assert 0.0 < sample(Target.cfg(3.0), steps=20, particles=64, temper=0.9).trace.applied() < 1.0
    assert 0.0 < sample(Target.cfg(3.0), steps=20, particles=64, clip=0.01).trace.clipped_share() < 1.0


def test_batch_size_changes_nothing(generator: Gen) -> None:
    models = {name: model.denoiser(VP) for name, model in MODELS.items()}
    clouds = [
        FeynmanKac(Target.cfg(2.0)).sample(
            models, VP, grid(8), particles=10, shape=(1,), generator=generator(), dtype=torch.float64, batch_size=size
        )
        for size in (None, 3)
    ]
    torch.testing.assert_close(clouds[0].x, clouds[1].x)


def test_wrong_input_is_refused_before_any_call() -> None:
    def forbidden(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    both = {"uncond": forbidden, "cond": forbidden}
    fk, options = FeynmanKac(Target.cfg(2.0)), {"particles": 2, "shape": (1,)}
    for match, run in {
        "missing denoisers: cond; unknown ones: none": lambda: fk.sample({"uncond": forbidden}, VP, grid(3), **options),
        "unknown ones: extra": lambda: fk.sample({**both, "extra": forbidden}, VP, grid(3), **options),
        "decrease strictly": lambda: fk.sample(both, VP, grid(3).flip(0), **options),
        "particles must be a whole number >= 1, got 0": lambda: fk.sample(both, VP, grid(3), particles=0, shape=(1,)),
        "floating-point type": lambda: fk.sample(both, VP, grid(3), dtype=torch.int64, **options),
        "need noise=1.0": lambda: FeynmanKac(Target.cfg(lambda t: 2.0), noise=0.5).sample(both, VP, grid(3), **options),
        "known: systematic": lambda: FeynmanKac(Target.cfg(2.0), resampling="best"),
        "share of the particles": lambda: FeynmanKac(Target.cfg(2.0), ess=1.5),
        "resample_window": lambda: FeynmanKac(Target.cfg(2.0), resample_window=(0.5, 0.2)),
        "positive sum": lambda: Target({"a": 1.0, "b": -1.0}),
        "finite number": lambda: Target({"a": math.inf}),
        "unknown potential": lambda: Target.power(1.0).with_reward(lambda x: x, potential="product"),
        "unknown target 'cgf:2'": lambda: Target.parse("cgf:2"),
        "target 'cfg:two'": lambda: Target.parse("cfg:two"),
    }.items():
        with pytest.raises(ValueError, match=match):
            run()


def test_a_reward_of_the_wrong_shape_is_named(generator: Gen) -> None:
    with pytest.raises(ValueError, match=r"reward returned shape \(4, 1\) for 4 samples; it must be \(4,\)"):
        sample(Target({"uncond": 1.0}).with_reward(lambda x: x), steps=2, particles=4, groups=1)


def test_dead_groups_are_reported() -> None:
    target = Target({"uncond": 1.0}).with_reward(lambda x: torch.full((len(x),), -math.inf))
    with pytest.warns(UserWarning, match="zero weight"):
        cloud = sample(target, steps=3, particles=4, groups=1)
    assert float(cloud.log_z[0]) == -math.inf


def test_contract_of_targets() -> None:
    assert dict(Target.cfg(2.0).exponents) == {"uncond": -1.0, "cond": 2.0}
    assert dict(Target.power(3.0).exponents) == {"model": 3.0}
    assert dict(Target.compose(uncond=-1, a=1, b=1).exponents) == {"uncond": -1.0, "a": 1.0, "b": 1.0}
    assert dict(Target.parse("cfg:2.0").exponents) == dict(Target.cfg(2.0).exponents)
