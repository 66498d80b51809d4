r"""Feynman-Kac correctors for masked discrete diffusion: annealing, products, guidance and rewards of token models.

Let $q_i(x_U)$ be what model i gives the revealed tokens U, and $\mu_i(v|x)$ its posterior at a masked site. The populations
follow $p(x_U) \propto \prod_i q_i(x_U)^{g_i} e^{s\,r}$ under the process's own masking, for every sum of exponents: a site is
revealed when the process reveals it, its token is drawn from $\prod_i \mu_i^{g_i}$ normalised, and the weight gains the
normaliser $S = \sum_v \prod_i \mu_i(v)^{g_i}$, because $q_i(x_U, v) = q_i(x_U)\,\mu_i(v|x)$. This is the jump process with
rates $\lambda \prod \mu_i^{g_i}$ and weight rate $\lambda (S - 1)$ per masked site (Hasan et al. 2026, arXiv:2601.10403),
integrated over the time of the jump. With one token per evaluation nothing is approximated; more at once share one posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..discrete import MaskedProcess, Model
from .cloud import Cloud, Population
from .potentials import Steering
from .settings import Settings


def run_discrete(
    fk: Settings,
    models: Mapping[str, Model],
    process: MaskedProcess,
    length: int,
    *,
    particles: int,
    nfe: int,
    groups: int | None,
    generator: torch.Generator | None,
    device: torch.device,
    progress: Callable[[int], None],
) -> Cloud:
    """See `FeynmanKac.sample_discrete`, which checks the arguments."""
    count = groups or 1
    x = process.prior((count * particles, length), device=device)
    population = Population(count, particles, fk.rules, device, generator)
    reward = fk.target.reward
    steering = None if reward is None else Steering(reward, len(x), population.device)
    times = [1.0 - step / nfe for step in range(nfe + 1)]
    for step in range(nfe):
        g = fk.target.at(times[step])
        at = process.schedule.t_of_alpha(1.0 - times[step])
        log_mix = _mixed([models[name](x, at) for name in fk.target.branches], g)
        if steering is not None and reward is not None and step % reward.every == 0:
            guess = torch.where(x == process.mask_id, log_mix.argmax(-1), x)
            population.add(steering.observe(steering.score(guess), times[step]))
        index = population.select(allowed=fk.resamples(step, nfe))
        if index is not None:
            if steering is not None:
                steering.select(index)
            index = index.to(device)
            x, log_mix = x[index], log_mix[index]
        chosen = _sites(x == process.mask_id, length - round(length * (step + 1) / nfe), generator)
        log_s = log_mix.logsumexp(-1)
        tokens = _draw((log_mix - log_s[..., None]).exp(), generator)
        x = torch.where(chosen, tokens, x)
        if fk.weighs(step, nfe):
            population.add(torch.where(chosen, log_s, 0.0).sum(-1))
        progress(step + 1)
    if steering is not None:
        population.add(steering.finish(steering.score(x), 0.0))
    trace, log_z = population.trace, population.total_log_z()
    stack = {name: torch.stack(getattr(trace, name)) for name in ("ess", "ancestors")}
    ids, log_w = x.reshape(*population.shape, length), population.log_w
    if groups is None:
        ids, log_w, log_z = ids[0], log_w[0], log_z[0]
        stack = {name: value[:, 0] for name, value in stack.items()}
    return Cloud(ids, log_w, log_z, stack["ess"], stack["ancestors"], trace, nfe * len(fk.target.branches))


def _mixed(posteriors: Sequence[Tensor], g: Sequence[float]) -> Tensor:
    """sum g_i log mu_i (B, L, V) in float64; a token that a branch of positive exponent rules out is out."""
    total = torch.zeros_like(posteriors[0], dtype=torch.float64)
    for weight, posterior in zip(g, posteriors, strict=True):
        if weight != 0.0:
            total = total + weight * posterior.double().clamp(min=1e-300).log()
    banned = torch.stack([p <= 0 for w, p in zip(g, posteriors, strict=True) if w > 0]).any(0)
    return total.masked_fill(banned, -torch.inf)


def _sites(masked: Tensor, remain: int, generator: torch.Generator | None) -> Tensor:
    """Uniformly random masked sites (B, L) to reveal so that ``remain`` stay masked in each row."""
    at = masked.device if generator is None else generator.device
    order = torch.rand(masked.shape, generator=generator, dtype=torch.float64, device=at).to(masked.device)
    order = torch.where(masked, order, torch.inf).argsort(-1).argsort(-1)
    return masked & (order < masked.sum(-1, keepdim=True) - remain)


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token (B, L) per site; rows without any probability, whose weight is zero, get token 0."""
    flat = probabilities.nan_to_num(0.0).flatten(0, 1)
    flat[:, 0] = torch.where(flat.sum(-1) > 0, flat[:, 0], 1.0)
    at = flat.device if generator is None else generator.device
    return torch.multinomial(flat.to(at), 1, generator=generator).to(flat.device).reshape(probabilities.shape[:-1])
