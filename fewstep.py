"""fewstep: how few network calls does a diffusion model need? The command line."""

from __future__ import annotations

import sys

import typer

from distill import cli as distill
from samplers.commands import demo, doctor, fid, minority, sample, schedule
from samplers.commands.common import INCOMPLETE, MISSING, USAGE, err_console
from search import cli as search_cli

INTERRUPTED = 130  # what typer returns after Ctrl-C

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo.demo)
app.command()(sample.sample)
app.add_typer(schedule.app, name="schedule")
app.add_typer(fid.app, name="fid")
app.add_typer(minority.app, name="minority")
app.add_typer(distill.app, name="distill")
app.add_typer(search_cli.app, name="search")
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line; errors are one line on stderr and an exit code."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
    if code == INTERRUPTED:
        err_console.print("interrupted; the same command continues where it stopped")
        code = INCOMPLETE
    sys.exit(code or 0)


def _exit_code(error: Exception) -> int | None:
    """Print a user's error and give its exit code; None for what must be a defect."""
    show = getattr(error, "show", None)  # click's usage errors; typer may carry its own copy of click
    if callable(show):
        show()
        return USAGE
    if not isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | PermissionError):
        return None
    err_console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return MISSING if type(error).__name__ == "MissingModelError" else USAGE


if __name__ == "__main__":
    main()
