"""`tunery checkpoints ...`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tunery.cli import output
from tunery.cli.jobs import JobId
from tunery.cli.output import AsJson
from tunery.client import Tunery

app = typer.Typer(no_args_is_help=True, help="What training made.")


@app.command("ls")
def list_(job_id: JobId, as_json: AsJson = False) -> None:
    """List a job's checkpoints, newest first."""
    with Tunery() as client:
        found = list(client.checkpoints.list(job_id))
    output.rows(
        ("CHECKPOINT", "STEP", "KINDS", "SIZE", "HELD-OUT LOSS", "CREATED"),
        (
            (
                row.id,
                row.step_number,
                ",".join(row.ext.get("kinds") or []),
                output.size(row.ext.get("bytes") or 0),
                row.metrics.get("full_valid_loss", row.metrics.get("valid_loss")),
                output.moment(row.created_at),
            )
            for row in found
        ),
        (row.model_dump() for row in found),
        as_json,
    )


@app.command()
def get(
    job_id: JobId,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help="An id, latest, best or step-<n>.")
    ] = "latest",
    into: Annotated[
        Path | None, typer.Option("--into", "-o", help="Folder; by default named after the job.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a checkpoint; every file is checked against its sha256."""
    folder = into or Path(job_id)
    with Tunery() as client:
        files = client.checkpoints.download(job_id, folder, checkpoint, _progress)
    output.rows(
        ("FILE", "SIZE", "SHA256"),
        ((file.path, output.size(file.bytes), file.sha256) for file in files),
        (file.model_dump() for file in files),
        as_json,
    )
    output.say(f"verified {len(files)} files in {folder}; PeftModel.from_pretrained loads it")


def _progress(path: str, done: int, total: int) -> None:
    if sys.stderr.isatty() and not output.manner.quiet:
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r{path}  {output.size(done)} of {output.size(total)}\033[K{end}")
