"""`tunery files ...`: data files at the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunery.cli import output
from tunery.cli.output import AsJson, Yes
from tunery.client import File, Tunery

app = typer.Typer(no_args_is_help=True, help="Data files at the service.")


@app.command()
def push(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The file to upload.")],
    as_json: AsJson = False,
) -> None:
    """Upload a data file; its id goes into a job."""
    with Tunery() as client:
        file = client.files.upload(path)
    output.emit_json(file.model_dump()) if as_json else output.emit(file.id)
    rows = file.ext.get("rows")
    if rows is not None:
        output.say(f"{rows:,} rows of {file.ext.get('format')} data")


@app.command("ls")
def list_(as_json: AsJson = False) -> None:
    """List them."""
    with Tunery() as client:
        found: list[File] = list(client.files.list())
    output.rows(
        ("FILE", "NAME", "PURPOSE", "SIZE", "ROWS", "CREATED"),
        (
            (
                file.id,
                file.filename,
                file.purpose,
                output.size(file.bytes),
                file.ext.get("rows"),
                output.moment(file.created_at),
            )
            for file in found
        ),
        (file.model_dump() for file in found),
        as_json,
    )


@app.command()
def remove(
    file_id: Annotated[str, typer.Argument(metavar="FILE", help="file-...")], yes: Yes = False
) -> None:
    """Delete a file from the service."""
    output.confirm(f"Delete {file_id}?", yes)
    with Tunery() as client:
        client.files.delete(file_id)
    output.say(f"deleted {file_id}")
