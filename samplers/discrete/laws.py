"""Laws with known answers that discrete samplers are measured on."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from .chains import MarkovModel
from .processes import Process
from .tabular import ProductMixtureModel, SupportModel


def random_chain(process: Process, seed: int = 1, spread: float = 2.5) -> MarkovModel:
    """A random Markov chain: logits of the first token and of every row are normal with deviation ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    vocab = process.vocab
    initial = (0.5 * spread * torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    step = (spread * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    return MarkovModel(initial, step, process)


def countdown_chain(process: Process, leak: float = 0.01) -> MarkovModel:
    """Each token is one less than the last, zero is followed by a uniform draw; ``leak`` of the time any token follows."""
    vocab = process.vocab
    step = torch.full((vocab, vocab), leak / vocab, dtype=torch.float64)
    step[0] += (1.0 - leak) / vocab
    for token in range(1, vocab):
        step[token, token - 1] += 1.0 - leak
    return MarkovModel(torch.full((vocab,), 1.0 / vocab, dtype=torch.float64), step, process)


def random_mixture(
    process: Process, length: int, components: int = 3, seed: int = 2, spread: float = 2.0
) -> ProductMixtureModel:
    """A mixture of random product laws, equal weights."""
    generator = torch.Generator().manual_seed(seed)
    shape = (components, length, process.vocab)
    sites = (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)
    return ProductMixtureModel(torch.ones(components, dtype=torch.float64), sites, process)


def parity_law(length: int, leak: float = 0.02) -> Tensor:
    """Bits (2,) * length: even sums share 1 - ``leak`` evenly, odd ones share ``leak``."""
    ids = torch.cartesian_prod(*[torch.arange(2)] * length)
    even = (ids.sum(-1) % 2 == 0).double()
    law = (1.0 - leak) * even / even.sum() + leak * (1.0 - even) / (1.0 - even).sum()
    return law.view((2,) * length)


def one_token_law(vocab: int = 15, seed: int = 0) -> Tensor:
    """A random law (vocab,) of one token: there Tweedie is exact in one step, and only other kernels have an error."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab, generator=generator, dtype=torch.float64).softmax(-1)


def sudoku_grids() -> Tensor:
    """The 288 complete 4x4 sudoku grids, (288, 16) with symbols 0 .. 3."""
    rows = list(permutations(range(4)))
    grids: list[tuple[int, ...]] = []

    def extend(grid: tuple[int, ...]) -> None:
        if len(grid) == 16:
            grids.append(grid)
            return
        for row in rows:
            if _fits(grid, row):
                extend(grid + row)

    extend(())
    return torch.tensor(grids)


def _fits(grid: tuple[int, ...], row: tuple[int, ...]) -> bool:
    """Whether ``row`` may follow the rows above it: no column and no 2x2 box repeats a symbol."""
    above = len(grid) // 4
    if any(grid[4 * r + c] == row[c] for r in range(above) for c in range(4)):
        return False
    return above % 2 == 0 or all({*grid[-4 + 2 * b : -2 + 2 * b or None]}.isdisjoint(row[2 * b : 2 * b + 2]) for b in (0, 1))


def sudoku_model(process: Process) -> SupportModel:
    """Exact posterior of uniformly drawn 4x4 sudoku grids."""
    if process.vocab != 4:
        raise ValueError(f"4x4 sudoku has 4 symbols, the process has {process.vocab}")
    return SupportModel(sudoku_grids(), process)


def is_sudoku(ids: Tensor) -> Tensor:
    """Whether each grid (B, 16) has every symbol once per row, column and 2x2 box; (B,) bool."""
    grid = ids.view(-1, 4, 4)
    boxes = grid.unflatten(1, (2, 2)).unflatten(3, (2, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
    groups = torch.cat([grid, grid.transpose(1, 2), boxes], dim=1)
    return (groups.sort(-1).values == torch.arange(4, device=ids.device)).all(-1).all(-1)
