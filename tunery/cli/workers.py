"""`tunery workers ...`; needs a key with the admin scope."""

from __future__ import annotations

from typing import Annotated

import typer

from tunery.cli import output
from tunery.cli.output import AsJson
from tunery.client import Tunery

app = typer.Typer(no_args_is_help=True, help="The machines that train.")

WorkerId = Annotated[str, typer.Argument(metavar="WORKER", help="wk_...")]


@app.command("ls")
def list_(as_json: AsJson = False) -> None:
    """List them."""
    with Tunery() as client:
        found = client.workers.list()
    output.rows(
        ("WORKER", "NAME", "STATUS", "DEVICES", "QUEUES", "JOBS", "HEARTBEAT"),
        (
            (
                row["id"],
                row["name"],
                row["status"],
                len(row["gpus"] or []),
                ",".join(row["queues"]),
                ",".join(row["job_ids"]),
                output.moment(row["heartbeat_at"]),
            )
            for row in found
        ),
        found,
        as_json,
    )


@app.command()
def drain(
    worker_id: WorkerId,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take work again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have a worker checkpoint and hand back its jobs, and take no more."""
    with Tunery() as client:
        row = client.workers.drain(worker_id, not undo)
    output.emit_json(row) if as_json else output.emit(f"{row['id']}\t{row['status']}")
