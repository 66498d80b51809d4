"""What samples are compared by: n-gram laws, pairs at a distance, patches, kernels, supports.

All take ids (n, L) and are about the law they were drawn from; nothing here knows a sampler.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Statistic = Callable[[Tensor], float]
TABLE = 2_000_000  # cells of an n-gram table
CELLS = 8000  # n-gram tables of the objective stay below this
FILLED = 0.1  # cells per window up to which smoothed counts are a law
LAGS = (2, 3, 5, 8)  # pairs that the objective sees beside n-grams; 4 and 6 are left to judge


def windows(ids: Tensor, name: str, vocab: int) -> tuple[Tensor, int]:
    """Codes (n, K) of a named kind of window, and the number of codes.

    Names: "3gram" (neighbours), "lag4" (pairs four apart), "patch3w8" (3x3 patches of a picture 8 wide).

    Raises:
        ValueError: unknown name, windows that do not fit, or a table that is too large.
    """
    length = ids.shape[1]
    if match := re.fullmatch(r"(\d+)gram", name):
        offsets = list(range(int(match[1])))
        starts = torch.arange(length - offsets[-1]) if 0 < len(offsets) <= length else None
    elif match := re.fullmatch(r"lag(\d+)", name):
        offsets = [0, int(match[1])]
        starts = torch.arange(length - offsets[1]) if 0 < offsets[1] < length else None
    elif match := re.fullmatch(r"patch(\d+)w(\d+)", name):
        side, width = int(match[1]), int(match[2])
        fits = width > 0 and length % width == 0 and 0 < side <= min(width, length // width)
        offsets = [width * r + c for r in range(side) for c in range(side)]
        starts = None
        if fits:
            rows, columns = torch.arange(length // width - side + 1), torch.arange(width - side + 1)
            starts = (width * rows[:, None] + columns).flatten()
    else:
        raise ValueError(f"unknown statistic {name!r}; known: <n>gram, lag<k>, patch<side>w<width>")
    if starts is None:
        raise ValueError(f"{name} does not fit into sequences of {length}")
    cells = vocab ** len(offsets)
    if cells > TABLE:
        raise ValueError(f"{name} over {vocab} tokens needs {cells} cells, the limit is {TABLE}")
    places = starts.to(ids.device)[:, None] + torch.tensor(offsets, device=ids.device)
    powers = vocab ** torch.arange(len(offsets) - 1, -1, -1, device=ids.device)
    return (ids[:, places] * powers).sum(-1), cells


def ngram_order(vocab: int, seq_len: int) -> int:
    """The longest n <= 3 whose table stays small."""
    return max(n for n in (1, 2, 3) if n == 1 or (vocab**n <= CELLS and n <= seq_len))


def objective_windows(vocab: int, seq_len: int) -> list[str]:
    """What "ngram_kl" compares: n-grams, and pairs farther apart than they reach.

    Without the pairs a search trades the order at a distance for that of neighbours, and its table does not hold up.
    """
    n = ngram_order(vocab, seq_len)
    judged = min(4, seq_len - 1)
    fits = vocab**2 <= CELLS
    return [f"{n}gram", *(f"lag{lag}" for lag in LAGS if fits and n <= lag < seq_len and lag != judged)]


def window_law(ids: Tensor, name: str, vocab: int) -> Tensor:
    """Frequencies (cells,) of a kind of window, float64."""
    codes, cells = windows(ids, name, vocab)
    return torch.bincount(codes.flatten(), minlength=cells).double() / codes.numel()


def window_kl(reference: Tensor, ids: Tensor, name: str, vocab: int) -> float:
    """KL of the windows' frequencies from a reference law; half a count is added to every cell of the sample's."""
    codes, cells = windows(ids, name, vocab)
    counts = torch.bincount(codes.flatten(), minlength=cells).double() + 0.5
    smooth, some = counts / counts.sum(), reference > 0
    return float((reference[some] * (reference[some] / smooth[some]).log()).sum())


def window_gap(reference: Tensor, ids: Tensor, name: str, vocab: int) -> float:
    """Distance of the windows' law from a reference law: `window_kl` where the sample fills the table, else `window_chi2`."""
    codes, cells = windows(ids, name, vocab)
    filled = cells <= FILLED * codes.numel()
    return (window_kl if filled else window_chi2)(reference, ids, name, vocab)


def window_chi2(reference: Tensor, ids: Tensor, name: str, vocab: int) -> float:
    """Half the chi-square distance of the windows' law q from a reference p: 1/2 sum (q - p)^2 / (p + 1 / (2 cells)).

    Unbiased at any number of sequences: q^2 is estimated from pairs of windows of different sequences. In a table that is
    mostly empty, counts make every law look far away, and the flatter the farther: a search on them learns to sharpen.
    """
    codes, cells = windows(ids, name, vocab)
    rows, each = codes.shape
    counts = torch.bincount(codes.flatten(), minlength=cells).double()
    both, times = torch.unique(codes + cells * torch.arange(rows, device=codes.device)[:, None], return_counts=True)
    own = torch.zeros_like(counts).index_add(0, both % cells, times.double() ** 2)
    squares = (counts**2 - own) / (rows * (rows - 1) * each**2)
    terms = squares - 2.0 * reference * counts / codes.numel() + reference**2
    return float(0.5 * (terms / (reference + 0.5 / cells)).sum())


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the L1 distance of two laws."""
    return float(0.5 * (p - q).abs().sum())


def block_entropy(ids: Tensor, vocab: int) -> float:
    """Entropy in nats per token of the largest windows the sample can fill (conditional entropy of neighbours).

    The longest n <= 4 whose table holds fewer cells than a tenth of the sample's windows; H(n) - H(n - 1).
    """
    n = 1
    while n < min(4, ids.shape[1]) and vocab ** (n + 1) <= 0.1 * ids.shape[0] * (ids.shape[1] - n):
        n += 1
    high = _entropy(window_law(ids, f"{n}gram", vocab))
    return high - (_entropy(window_law(ids, f"{n - 1}gram", vocab)) if n > 1 else 0.0)


def _entropy(law: Tensor) -> float:
    return float(-(law[law > 0] * law[law > 0].log()).sum())


@dataclass(frozen=True)
class HammingMMD:
    """Squared maximum mean discrepancy under kernels exp(-share of differing sites / scale), averaged over scales.

    Attributes:
        reference: ids (m, L) the samples are compared with.
        vocab: vocabulary.
        scales: kernel widths.
    """

    reference: Tensor
    vocab: int
    scales: tuple[float, ...] = (0.02, 0.05, 0.15, 0.5)

    def __post_init__(self) -> None:
        """Cache what does not depend on the samples."""
        hot = self._hot(self.reference)
        object.__setattr__(self, "_reference_hot", hot)
        object.__setattr__(self, "_own", self._mean(hot, None))

    def __call__(self, ids: Tensor) -> float:
        """Unbiased estimate; it can be slightly negative."""
        hot = self._hot(ids)
        return self._own + self._mean(hot, None) - 2.0 * self._mean(hot, self._reference_hot)

    def _hot(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, self.vocab).flatten(1).float()

    def _mean(self, a: Tensor, b: Tensor | None) -> float:
        length = self.reference.shape[1]
        differ = 1.0 - (a @ (a if b is None else b).T) / length
        kernel = sum(torch.exp(-differ / scale) for scale in self.scales) / len(self.scales)
        if b is not None:
            return float(kernel.double().mean())
        n = len(a)
        return float((kernel.double().sum() - n) / (n * (n - 1)))


def support_law(ids: Tensor, points: Tensor) -> Tensor:
    """Frequencies (N + 1,) of the listed sequences (N, L), the last for everything else, float64."""
    both, inverse = torch.unique(torch.cat([points, ids]), dim=0, return_inverse=True)
    place = torch.full((len(both),), len(points), device=ids.device)
    place[inverse[: len(points)]] = torch.arange(len(points), device=ids.device)
    return torch.bincount(place[inverse[len(points) :]], minlength=len(points) + 1).double() / len(ids)
