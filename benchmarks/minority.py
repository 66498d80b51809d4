"""Does minority guidance reach rare modes? Against unguided sampling, rejection at equal NFE, and controls.

    python benchmarks/minority.py --part mixture --part digits --work DIR [--seeds 3 | --seeds 3,4,5] [--rows TEXT]
    python benchmarks/minority.py --table

``--seeds 3`` is 0, 1 and 2; ``--rows`` computes only the rows whose name contains the text. Results go to
``benchmarks/results/minority-PART.json`` after every row; the same command continues an interrupted run. ``--sampler`` names
the samplers of the rows at 10 network evaluations: recipe text or a JSON schedule; by default two recipes and the schedule
that ``benchmarks/minority_schedules.py`` found for the part's model, if it is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import minority_cifar
import minority_digits
import minority_mixture
import torch
from minority_record import Record

PARTS = ("mixture", "digits", "cifar")
RESULTS = Path(__file__).parent / "results"
SAMPLERS = ["ddpm", "dpmpp:order=2"]
MODELS = {"mixture": "mixture", "digits": "digits-planted", "cifar": "cifar16-thinned"}


def samplers_of(part: str, given: list[str] | None) -> list[str]:
    """The samplers of the rows at few evaluations."""
    found = RESULTS / f"minority-{MODELS[part]}-nfe10.json"
    return given or SAMPLERS + ([str(found)] if found.is_file() else [])


def seeds_of(text: str) -> list[int]:
    """3 -> 0, 1, 2; 3,4,5 -> those."""
    return [int(seed) for seed in text.split(",") if seed] if "," in text else list(range(int(text)))


def fill_page(page: Path, records: dict[str, Record]) -> None:
    """Put the tables between their marks in the documentation."""
    text = page.read_text()
    for part, record in records.items():
        before, mark, rest = text.partition(f"<!-- benchmarks/minority.py {part} -->")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}\n{record.table()}\n{end}{after}"
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, default=None)
    parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="how many, or which, with commas")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--sampler", action="append", default=None)
    parser.add_argument("--data", type=Path, help="for --part cifar")
    parser.add_argument("--work", type=Path, default=Path("minority-work"), help="folder for scores and classifiers")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--page", type=Path, help="also write the tables into this page")
    args = parser.parse_args()
    parts = args.part or PARTS[:2]
    if "cifar" in parts and args.data is None and not args.table:
        parser.error("--part cifar needs --data, the CIFAR-10 file of benchmarks/models/train_cifar16_thinned.py")
    records = {part: Record(RESULTS / f"minority-{part}.json") for part in parts}
    if not args.table:
        torch.set_num_threads(1)
        RESULTS.mkdir(exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for part in parts:
                samplers = samplers_of(part, args.sampler)
                if part == "cifar":
                    rows = minority_cifar.rows(seed, samplers, args.work, args.data)
                else:
                    module = minority_mixture if part == "mixture" else minority_digits
                    rows = module.rows(seed, samplers, args.work)
                records[part].run(seed, rows, args.rows)
    for part, record in records.items():
        print(f"\n## {part}\n\n{record.table()}")
    if args.page:
        fill_page(args.page, records)


if __name__ == "__main__":
    main()
