"""`tunery methods ...`: what can be asked for, from the catalogue that is installed here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery import catalogue
from tunery.cli import output
from tunery.cli.output import AsJson
from tunery.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(no_args_is_help=True, help="Methods, adapters, tasks and transforms.")


@app.command("ls")
def list_(as_json: AsJson = False) -> None:
    """List every entry of every shelf."""
    found = [
        catalogue.describe(shelf, name)
        for shelf in catalogue.SHELVES
        for name in catalogue.entries(shelf)
    ]
    output.rows(
        ("SHELF", "NAME", "WHAT IT DOES"),
        ((entry["shelf"], entry["name"], entry["summary"]) for entry in found),
        found,
        as_json,
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Such as lora; or shelf/name, adapters/lora.")],
    as_json: AsJson = False,
) -> None:
    """Show an entry: what it works with, its settings, an example."""
    entry = _find(name)
    if as_json:
        output.emit_json(entry)
        return
    output.record(entry, False, _head(entry))
    for field, schema in (entry["schema"].get("properties") or {}).items():
        default = json.dumps(schema["default"]) if "default" in schema else "required"
        output.emit(f"{field}\t{default}\t{schema.get('description', '')}")
    output.say("example: " + json.dumps(entry["example"]))


def _head(entry: Mapping[str, Any]) -> dict[str, Any]:
    works = {key: ", ".join(values) for key, values in entry["works_with"].items()}
    return {
        "name": f"{entry['shelf']}/{entry['name']}",
        "title": entry["title"],
        "summary": entry["summary"],
        "paper": entry["paper"],
        **works,
    }


def _find(name: str) -> dict[str, Any]:
    shelves = catalogue.SHELVES
    if "/" in name:
        wanted, name = name.split("/", 1)
        shelves = tuple(shelf for shelf in shelves if shelf == wanted)
    for shelf in shelves:
        if name in catalogue.entries(shelf):
            return catalogue.describe(shelf, name)
    raise NotFound(f"the catalogue has no entry {name!r}", hint="`tunery methods ls` lists them")
