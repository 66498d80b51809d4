"""Is a learned sampler better, or only sharper? Scores of two samplers, and the reasons not to call one an improvement.

Likelihood under the data law alone rewards sharpening: a sampler that repeats the likeliest sequences scores better than
the data. So every score comes with the entropy, and a learned table must also hold on statistics its objective never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .statistics import block_entropy, ngram_order, total_variation, window_kl, window_law, windows

SLACK = 1.05  # a held-out statistic may be this much worse before it counts
SHARP = 0.01  # nats per token of entropy that sampling noise may hide
Scores = Mapping[str, float]


def exact_scores(law: Tensor, student: Tensor) -> dict[str, float]:
    """KL, TV, and the NLL and entropy gaps per token, of a student's law (V,) * L from the true one.

    ``nll_gap`` is the student's cross-entropy under the law minus the law's entropy; negative means likelier than data.
    ``nll_gap`` and ``entropy_gap`` are infinite or signed; a student outside a law's support has an infinite NLL.
    """
    p, q, length = law.flatten().double(), student.flatten().double(), law.ndim
    some, used = p > 0, q > 1e-15
    entropy = float(-(p[some] * p[some].log()).sum())
    nll = float(-(q[used] * p[used].log()).sum())
    return {
        "kl": float((p[some] * (p[some] / q[some]).log()).sum()),
        "tv": total_variation(p, q),
        "nll_gap": (nll - entropy) / length,
        "entropy_gap": (float(-(q[used] * q[used].log()).sum()) - entropy) / length,
    }


def default_holdout(objective: str, vocab: int, seq_len: int, data: int) -> tuple[str, ...]:
    """Statistics that the objective does not contain and ``data`` sequences can fill."""
    names = []
    seen = ngram_order(vocab, seq_len) if objective == "ngram_kl" else 0
    for n in (4, 3, 2):
        if n <= seq_len and vocab**n <= max(vocab, 0.2 * data * (seq_len - n + 1)) and n > seen:
            names.append(f"{n}gram")
            break
    lags = (min(4, seq_len - 1),) if names else (min(4, seq_len - 1), 6)
    names += [f"lag{lag}" for lag in lags if 0 < lag < seq_len and vocab**2 <= 0.2 * data * (seq_len - lag)]
    return tuple(names) or ("1gram",)


def sampled_scores(ids: Tensor, reference: Tensor, names: Sequence[str], vocab: int) -> dict[str, float]:
    """KL of n-grams, TV of other windows, and the block-entropy gap, of ids (n, L) from reference ids (m, L)."""
    scores = {}
    for name in names:
        law = window_law(reference, name, vocab)
        if name.endswith("gram"):
            scores[f"{name}_kl"] = window_kl(law, ids, name, vocab)
        else:
            scores[f"{name}_tv"] = total_variation(law, window_law(ids, name, vocab))
    n = min(len(ids), len(reference))
    return scores | {"entropy_gap": block_entropy(ids[:n], vocab) - block_entropy(reference[:n], vocab)}


def floor_scores(reference: Tensor, names: Sequence[str], vocab: int) -> dict[str, float]:
    """`sampled_scores` of one half of the reference against the other: what no sampler can be better than."""
    return sampled_scores(reference[::2], reference[1::2], names, vocab)


def reasons_against(plain: Scores, learned: Scores, floor: Scores | None = None) -> list[str]:
    """Why the learned sampler must not be called better; empty if it may.

    Args:
        plain: scores of the base sampler at equal NFE, lower is better but for the two gaps.
        learned: the same of the learned one.
        floor: the same of real data against real data.
    """
    reasons = []
    for name, value in learned.items():
        if name in ("entropy_gap", "nll_gap"):
            continue
        noise = 0.0 if floor is None else 0.5 * abs(floor.get(name, 0.0))
        if value > SLACK * plain[name] + noise:
            reasons.append(f"{name} is worse: {value:.4g} against {plain[name]:.4g}")
    gap, before = learned.get("entropy_gap", 0.0), plain.get("entropy_gap", 0.0)
    noise = SHARP if floor is None else max(SHARP, 2.0 * abs(floor.get("entropy_gap", 0.0)))
    if gap < -noise and -gap > abs(before):
        reasons.append(f"it is sharper than the target: entropy gap {gap:.4g} nats per token against {before:.4g}")
    if learned.get("nll_gap", 0.0) < -noise and gap < -noise:
        reasons.append(f"its samples are likelier than the target's own: NLL gap {learned['nll_gap']:.4g} nats per token")
    return reasons


def check_names(names: Sequence[str], vocab: int, seq_len: int) -> None:
    """Refuse unknown or unfitting statistics before any compute."""
    probe = torch.zeros(1, seq_len, dtype=torch.int64)
    for name in names:
        windows(probe, name, vocab)
