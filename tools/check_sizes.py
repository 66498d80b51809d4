"""Fail on Python files above the limit of lines: such a file is split, not excused."""

import sys
from pathlib import Path

LIMIT = 400
ROOT = Path(__file__).parent.parent


def main() -> int:
    """Name every file above the limit; the exit code is 1 if there is one."""
    patterns = ("samplers/**/*.py", "search/**/*.py", "distill/**/*.py", "fewstep.py")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    large = {path: count for path, count in sorted(lines.items()) if count > LIMIT}
    for path, count in large.items():
        print(f"{path.relative_to(ROOT)}: {count} lines, the limit is {LIMIT}: split it", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
