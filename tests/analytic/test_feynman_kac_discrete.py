"""Discrete correctors against full enumeration of small laws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers.discrete import MaskedProcess, TabularModel, UniformProcess
from samplers.particles import Cloud, FeynmanKac, Target
from samplers.particles import discrete as module

VOCAB, LENGTH = 3, 4
PROCESS = MaskedProcess(VOCAB)
Gen = Callable[..., torch.Generator]


def law(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand((VOCAB,) * LENGTH, generator=g, dtype=torch.float64) ** 3
    return weights / weights.sum()


LAWS = {"uncond": law(1), "cond": law(2)}
MODELS = {name: TabularModel(table, PROCESS) for name, table in LAWS.items()}


def sample(target: Target, particles: int = 1000, groups: int = 20, seed: int = 0, nfe: int | None = None, **kw: Any) -> Cloud:
    models = {name: MODELS[name] for name in target.exponents}
    g = torch.Generator().manual_seed(seed)
    return FeynmanKac(target, **kw).sample_discrete(
        models, PROCESS, LENGTH, particles=particles, groups=groups, generator=g, nfe=nfe
    )


def exact(target: Target, reward: Tensor | None = None) -> tuple[Tensor, float]:
    log_p = sum(g * LAWS[name].log() for name, g in target.exponents.items())
    log_p = log_p if reward is None else log_p + reward
    return log_p.flatten().softmax(0), float(log_p.flatten().logsumexp(0))


def frequencies(cloud: Cloud) -> Tensor:
    place = (cloud.x * torch.tensor([VOCAB**k for k in range(LENGTH - 1, -1, -1)])).sum(-1)
    w = cloud.w / len(cloud.w)
    return torch.zeros(VOCAB**LENGTH, dtype=torch.float64).scatter_add(0, place.flatten(), w.flatten())


def distance(cloud: Cloud, truth: Tensor) -> float:
    return float(0.5 * (frequencies(cloud) - truth).abs().sum())


TARGETS = {
    "guidance": Target.cfg(2.5),
    "geometric mean": Target.cfg(0.5),
    "annealed": Target({"cond": 2.0}),
    "flattened": Target({"cond": 0.5}),
    "product": Target.product("uncond", "cond"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_laws_and_normalisers(name: str) -> None:
    target = TARGETS[name]
    truth, log_z = exact(target)
    cloud = sample(target)
    z = (cloud.log_z - log_z).exp()
    assert float(z.mean()) == pytest.approx(1.0, abs=4 * float(z.std()) / 20**0.5 + 1e-9)
    right = distance(cloud, truth)
    assert right < 0.045
    assert distance(sample(target, weight_window=(0, 0)), truth) > 1.6 * right


@pytest.mark.parametrize("name", TARGETS)
def test_the_wrong_sign_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, log_z = exact(TARGETS[name])
    add = module.Population.add
    monkeypatch.setattr(module.Population, "add", lambda self, increment: add(self, -increment))
    cloud = sample(TARGETS[name])
    assert distance(cloud, truth) > 0.06
    assert abs(float(cloud.log_z.mean()) - log_z) > 0.2


def test_rewards(generator: Gen) -> None:
    target = Target({"cond": 1.0})
    table = torch.arange(VOCAB**LENGTH).reshape((VOCAB,) * LENGTH)
    ones = sum((table // VOCAB**k % VOCAB == 1).double() for k in range(LENGTH))
    truth, log_z = exact(target, 0.8 * ones)
    cloud = sample(target.with_reward(lambda x: (x == 1).sum(-1).double(), 0.8))
    assert distance(cloud, truth) < 0.04
    assert float(cloud.log_z.mean()) == pytest.approx(log_z, abs=0.02)
    assert distance(sample(target), truth) > 0.2


def test_fewer_evaluations_are_an_approximation_that_improves() -> None:
    truth, _ = exact(TARGETS["guidance"])
    errors = [distance(sample(TARGETS["guidance"], nfe=n), truth) for n in (1, 2, 4)]
    assert errors[2] < 0.6 * errors[0]
    assert errors[2] < errors[1]


def test_tokens_that_a_branch_rules_out_never_appear() -> None:
    table = law(3)
    table[:, 1] = 0.0
    models = {"uncond": MODELS["uncond"], "cond": TabularModel(table / table.sum(), PROCESS)}
    cloud = FeynmanKac(Target.cfg(2.0)).sample_discrete(
        models, PROCESS, LENGTH, particles=500, generator=torch.Generator().manual_seed(0)
    )
    assert not bool((cloud.x[cloud.w > 0][:, 1] == 1).any())
    assert bool((cloud.x < VOCAB).all())


def test_refusals() -> None:
    fk = FeynmanKac(Target.cfg(2.0))
    for match, run in {
        "masked noise, not UniformProcess": lambda: fk.sample_discrete(MODELS, UniformProcess(3), 4, particles=2),
        "missing models: cond": lambda: fk.sample_discrete({"uncond": MODELS["uncond"]}, PROCESS, 4, particles=2),
        "at most 4 evaluations, got nfe=9": lambda: fk.sample_discrete(MODELS, PROCESS, 4, particles=2, nfe=9),
        "must be constant": lambda: FeynmanKac(Target.cfg(lambda t: 2.0)).sample_discrete(MODELS, PROCESS, 4, particles=2),
    }.items():
        with pytest.raises(ValueError, match=match):
            run()
