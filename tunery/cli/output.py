"""Data on stdout, everything else on stderr.

A terminal gets tables and colour; a pipe gets plain lines, tab-separated and without a heading;
`--json` gives one object, of a list one object a line. NO_COLOR is obeyed.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunery.cli.exits import Exit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

AsJson = Annotated[bool, typer.Option("--json", help="Data as JSON; lists as one object a line.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "dim",
    "running": "blue",
    "paused": "yellow",
}


class _Manner:
    """How this run of the command line talks; set once, by `main`."""

    quiet = False
    no_input = False


manner = _Manner()


def err() -> Console:
    """The console for people. Made anew each time: tests and pipes swap the stream."""
    return Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Tell a person something that is not data."""
    if not manner.quiet:
        err().print(text)


def complain(text: str, hint: str | None = None) -> None:
    """Say what went wrong and what to do; `--quiet` does not silence it."""
    console = err()
    console.print(Text("error: ", style="bold red").append(text, style="not bold default"))
    if hint:
        console.print(f"  {hint}")


def write(text: str) -> None:
    """Data that has its own line ends, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def emit(line: str) -> None:
    """One line of data, as it is, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def emit_json(value: Any) -> None:
    """One object on one line."""
    emit(json.dumps(value, ensure_ascii=False, default=str))


def rows(
    titles: Sequence[str],
    values: Iterable[Sequence[Any]],
    objects: Iterable[Mapping[str, Any]],
    as_json: bool,
) -> None:
    """A list: `objects` as JSON, or `values` as a table or as lines."""
    if as_json:
        for item in objects:
            emit_json(item)
        return
    if not sys.stdout.isatty():
        for row in values:
            emit("\t".join("" if cell is None else str(cell) for cell in row))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, no_wrap=title == titles[0])
    count = 0
    for row in values:
        count += 1
        table.add_row(*(_cell(cell) for cell in row))
    if count:
        Console(file=sys.stdout, highlight=False, markup=False).print(table)
    else:
        say("nothing here")


def _cell(value: Any) -> Text:
    text = "" if value is None else str(value)
    return Text(text, style=COLOURS.get(text, ""))


def record(value: Mapping[str, Any], as_json: bool, shown: Mapping[str, Any] | None = None) -> None:
    """One object: as JSON, or `shown` (by default itself) as lines of name and value."""
    if as_json:
        emit_json(value)
        return
    pairs = {key: inner for key, inner in (shown or value).items() if inner is not None}
    if not sys.stdout.isatty():
        for name, inner in pairs.items():
            emit(f"{name}\t{inner}")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, inner in pairs.items():
        table.add_row(name, _cell(inner))
    Console(file=sys.stdout, highlight=False, markup=False).print(table)


def confirm(question: str, yes: bool) -> None:
    """Ask before something that cannot be undone.

    Off a terminal nobody can answer: `--yes` is required there. A refusal is not success.

    Raises:
        typer.Exit: with `Exit.USAGE` when nobody can be asked or the answer is no.
    """
    if yes:
        return
    if manner.no_input or not sys.stdin.isatty():
        complain(f"{question} Nobody can be asked here", "pass --yes to do it")
        raise typer.Exit(Exit.USAGE)
    if not typer.confirm(question, err=True):
        say("nothing was done")
        raise typer.Exit(Exit.USAGE)


def size(count: float) -> str:
    """Bytes for people, in the units that disks are sold in."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes everything")


def count(number: float) -> str:
    """A large number in few characters: 134.5M, 18.4k."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 18 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(unix: float | None) -> str | None:
    """A point in time, in this machine's time zone."""
    if unix is None:
        return None
    return datetime.fromtimestamp(unix, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
