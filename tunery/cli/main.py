"""The `tunery` command: puts the parts together, and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from tunery import __version__
from tunery.cli import (
    checkpoints,
    data,
    doctor,
    files,
    jobs,
    login,
    methods,
    models,
    output,
    service,
    train,
    workers,
)
from tunery.cli.exits import Exit, code_of
from tunery.errors import AppError

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune models on your own machines.",
    epilog="Exit codes: 0 ok, 1 a bug of ours, 2 usage, 3 refused, 4 not found, 5 not permitted, "
    "6 conflict, 7 unavailable; watch, wait and train: 10 failed, 11 cancelled, 12 timed out.",
)
app.command()(service.up)
app.command()(service.status)
app.command()(service.down)
app.command()(login.login)
app.command()(train.train)
app.add_typer(jobs.app, name="jobs")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(files.app, name="files")
app.add_typer(files.app, name="datasets", hidden=True)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(methods.app, name="methods")
app.add_typer(workers.app, name="workers")
app.add_typer(service.keys, name="keys")
app.command()(doctor.doctor)

QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but data and errors.")]
NoInputFlag = Annotated[bool, typer.Option("--no-input", help="Never ask.")]


def _version(wanted: bool) -> None:
    if wanted:
        output.emit(__version__)
        raise typer.Exit


@app.callback()
def _root(
    quiet: QuietFlag = False,
    no_input: NoInputFlag = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    output.manner.quiet = quiet
    output.manner.no_input = no_input


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    try:
        app(args=list(arguments), prog_name="tunery")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except AppError as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.OK)
    except Exception:
        output.err().print(traceback.format_exc(), end="")
        output.complain("this is a bug of Tunery's", "please report it with the lines above")
        return int(Exit.BUG)
    return int(Exit.OK)


def _report(error: AppError) -> int:
    output.complain(str(error), error.hint)
    for problem in error.problems:
        line = f"line {problem['line']}: " if problem.get("line") else ""
        path = f"{problem['path']}: " if problem.get("path") else ""
        output.err().print(f"  {line}{path}{problem.get('message') or problem.get('code')}")
    return int(code_of(error))


if __name__ == "__main__":
    main()
