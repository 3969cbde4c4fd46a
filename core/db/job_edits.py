"""Changes to a job that touch neither its state nor its mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, select, update

from core.db.tables import CheckpointRow, JobRow
from tunery.errors import Conflict

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


class _Unset:
    """Tells "leave it" from "make it null"."""


UNSET: Final = _Unset()
ENDED = ("succeeded", "failed", "cancelled")


async def edit(
    session: AsyncSession,
    project_id: int,
    public_id: str,
    *,
    metadata: dict[str, Any] | _Unset | None = UNSET,
    priority: int | _Unset = UNSET,
) -> bool:
    """Whether there is such a job, now changed.

    Raises:
        Conflict: the priority of a job that has ended.
    """
    state = await session.scalar(
        select(JobRow.state)
        .where(JobRow.project_id == project_id, JobRow.public_id == public_id)
        .with_for_update()
    )
    if state is None:
        return False
    values: dict[Any, Any] = {}
    if not isinstance(metadata, _Unset):
        values[JobRow.metadata_] = metadata
    if not isinstance(priority, _Unset):
        if state in ENDED:
            raise Conflict(f"the job is {state}: its priority means nothing any more")
        values[JobRow.priority] = priority
    if values:
        await session.execute(
            update(JobRow)
            .where(JobRow.public_id == public_id)
            .values(values)
            .execution_options(synchronize_session=False)
        )
    return True


async def mark_export_deleted(session: AsyncSession, checkpoint_id: int) -> None:
    """Take a checkpoint's export out of every listing; its files are about to go."""
    await session.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint_id)
        .values(deleted_at=func.coalesce(CheckpointRow.deleted_at, func.clock_timestamp()))
        .execution_options(synchronize_session=False)
    )
