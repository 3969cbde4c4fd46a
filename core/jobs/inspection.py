"""Asks a worker what the base model's tokenizer makes of a job's files, and waits for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from core.db import inspections

if TYPE_CHECKING:
    from collections.abc import Mapping

    from core.db.engine import Database

LOOK_S = 0.25
_NOT_INSPECTED = {
    "code": "data_not_inspected",
    "path": "training_file",
    "message": "no worker has read the files with the base model's tokenizer: whether their rows "
    "can be learnt from is looked at when the job starts",
    "severity": "warning",
}


async def inspect(
    db: Database,
    *,
    wait_s: float,
    project_id: int,
    queue: str,
    spec: Mapping[str, Any],
    training_file_id: int,
    validation_file_id: int | None,
) -> dict[str, Any]:
    """`{preflight, problems, warnings}`, of a worker; a warning alone when none answers in time.

    Raises:
        ServiceUnavailable: Postgres is away.
    """
    async with db.begin() as session:
        question = await inspections.ask(
            session,
            project_id=project_id,
            queue=queue,
            spec=spec,
            training_file_id=training_file_id,
            validation_file_id=validation_file_id,
        )
    give_up = asyncio.get_running_loop().time() + wait_s
    while asyncio.get_running_loop().time() < give_up:
        async with db.read() as session:  # no connection is held between two looks
            said = await inspections.read(session, question)
        if said is not None:
            return said
        await asyncio.sleep(LOOK_S)
    return nobody()


def nobody() -> dict[str, Any]:
    """What is said where there is no worker to ask, or none that answers."""
    return {"preflight": None, "problems": [], "warnings": [_NOT_INSPECTED]}
