"""What the discrete benchmark is expected to show, checked: thresholds set beforehand, learned NFE 8 against plain NFE 24."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

Found = Mapping[tuple[str, str, str], Mapping[str, Mapping[int, Mapping[int, Mapping]]]]  # subject, sampler, NFE, seed
SCORE = {
    "exact": ("kl",),
    "chains": ("4gram_kl",),
    "sudoku": ("tv",),
    "digits": ("mmd_1e3", "patch_tv"),
    "text": ("perplexity", "reverse_perplexity"),
}
DATA = ("law", "data")
EXPECTED = [  # subject, sampler's beginning, NFE, score, whether more is better, threshold
    (("exact", "markov", "uniform"), "learned exact_kl, law", 8, "kl", False, 0.01),
    (("exact", "mixture", "masked"), "learned exact_kl, law", 4, "kl", False, 0.02),
    (("sudoku", "network", "uniform"), "learned tv_support, data", 4, "valid", True, 0.60),
    (("sudoku", "network", "uniform"), "learned tv_support, teacher", 4, "valid", True, 0.60),
    (("sudoku", "network", "uniform"), "learned tv_support, data", 4, "grids", True, 287),
]


def found_in(cells: Sequence[Mapping]) -> Found:
    """The cells by subject, sampler, NFE and seed."""
    found: dict = {}
    for cell in cells:
        part, task, process, seed, nfe, sampler = cell["key"].split("/", 5)
        found.setdefault((part, task, process), {}).setdefault(sampler, {}).setdefault(int(nfe), {})[int(seed)] = cell
    return found


def checks(cells: Sequence[Mapping]) -> str:
    """Both tables, as markdown."""
    found = found_in(cells)
    lines = ["### Thresholds set beforehand", "", "| law | sampler | score | plain | learned | wanted | holds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for subject, sampler, nfe, score, more, limit in EXPECTED:
        seeds = found.get(subject, {}).get(sampler, {}).get(nfe, {})
        if not seeds:
            continue
        values = [cell[score] for cell in seeds.values()]
        name, before = _best(found[subject], nfe, score, set(seeds), more=more)
        good = all(v >= limit if more else v < limit for v in values)
        wanted = f"{'at least' if more else 'below'} {limit:g}"
        spread = f"{mean(values):.3g} ({min(values):.3g} to {max(values):.3g}, {len(values)} seed{'s' * (len(values) > 1)})"
        row = (_label(subject), f"{sampler}, NFE {nfe}", score, f"{before:.3g} ({name})", spread, wanted)
        lines.append(f"| {' | '.join(row)} | {'yes' if good else 'no'} |")
    lines += ["", "### Learned at NFE 8 against the best plain sampler at NFE 24", ""]
    lines += ["| law | score | learned at 8 | plain at 8 | plain at 24 | seeds | as good |", "|---|---|---|---|---|---|---|"]
    for subject, samplers in sorted(found.items(), key=lambda item: ([*SCORE, "cost"].index(item[0][0]), item[0])):
        for score in SCORE.get(subject[0], ()):
            for sampler, nfes in samplers.items():
                if sampler.startswith("learned") and sampler.endswith((*DATA, "teacher")) and 8 in nfes:
                    lines += _against(subject, samplers, sampler, score)
    return "\n".join([*lines, ""])


def _against(subject: tuple[str, str, str], samplers: Mapping, sampler: str, score: str) -> list[str]:
    """A row, where a plain sampler of 24 evaluations was measured and the fit is the part's main one."""
    main = {"exact": "exact_kl", "chains": "ngram_kl", "sudoku": "tv_support", "digits": "mmd", "text": "ngram_kl"}[subject[0]]
    rivals = {name for name, nfes in samplers.items() if 24 in nfes and not name.startswith("learned")}
    shared = set(samplers[sampler][8]) & {seed for name in rivals for seed in samplers[name][24]}
    if f"learned {main}" not in sampler or not shared:
        return []
    learned = mean(samplers[sampler][8][seed][score] for seed in shared)
    before, (name, plain) = _best(samplers, 8, score, shared), _best(samplers, 24, score, shared)
    target = sampler.rpartition(", ")[2]
    row = (
        f"{_label(subject)}, fitted to the {target}",
        score,
        f"{learned:.3g}",
        f"{before[1]:.3g} ({before[0]})",
    )
    return [f"| {' | '.join(row)} | {plain:.3g} ({name}) | {len(shared)} | {'yes' if learned <= plain else 'no'} |"]


def _label(subject: tuple[str, str, str]) -> str:
    part, task, process = subject
    return f"{part if task in ('network', 'characters') else task}{', 32 sites' * (part == 'chains')}, {process} noise"


def _best(samplers: Mapping, nfe: int, score: str, seeds: set[int], *, more: bool = False) -> tuple[str, float]:
    """The best plain transition on these seeds: those that sharpen are not among them, likelihoods would call them best."""
    means = {}
    for name, nfes in samplers.items():
        if (
            not name.startswith(("learned", "confidence", "entropy_bound"))
            and "," not in name
            and seeds <= set(nfes.get(nfe, {}))
        ):
            means[name] = mean(nfes[nfe][seed][score] for seed in seeds)
    name = (max if more else min)(means, key=means.get)
    return name, means[name]
