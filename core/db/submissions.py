"""What a submission has to know before it may insert a job, in one statement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import func, select

from core.db.tables import FileRow, JobRow, WorkerRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncSession

QUOTA_LOCKS = 0x7175  # first half of the two-part advisory lock; the second is the project
MARGIN = 200
"""More submissions than can be in flight at once: with this much room nobody counts exactly."""
WORKER_LIVE_S = 120.0


class File(NamedTuple):
    """What a job needs of a data file."""

    id: int
    public_id: str
    purpose: str
    status: str
    status_details: str | None
    expired: bool
    sha256: str
    size_bytes: int
    suffix: str
    format: str | None
    rows: int | None
    labels: list[str] | None


class References(NamedTuple):
    files: dict[str, File]
    open_jobs: int
    """Jobs of the project that have not ended; exact only under `lock_quota`."""
    counted_freely: bool
    """Whether no exclusive counter was at work."""


_open = JobRow.state.not_in(("succeeded", "failed", "cancelled"))


def open_jobs(project_id: int) -> Any:
    """Scalar subquery: jobs of a project that have not ended."""
    return (
        select(func.count())
        .select_from(JobRow)
        .where(JobRow.project_id == project_id, _open)
        .scalar_subquery()
    )


async def references(
    session: AsyncSession,
    project_id: int,
    files: Sequence[str],
    *also: ColumnElement[Any],
) -> References:
    """The files of a submission, as far as they exist, and how many jobs are open.

    Takes the project's quota lock in shared mode, until the transaction ends. `also`: further
    expressions to evaluate on the way, locks for instance.
    """
    facts = select(
        open_jobs(project_id).label("open_jobs"),
        func.pg_try_advisory_xact_lock_shared(QUOTA_LOCKS, project_id).label("free"),
        *also,
    ).subquery()
    result = await session.execute(
        select(
            facts.c.open_jobs,
            facts.c.free,
            FileRow.id,
            FileRow.public_id,
            FileRow.purpose,
            FileRow.status,
            FileRow.status_details,
            func.coalesce(FileRow.expires_at <= func.clock_timestamp(), False),
            FileRow.sha256,
            FileRow.size_bytes,
            FileRow.suffix,
            FileRow.format,
            FileRow.rows,
            FileRow.labels,
        )
        .select_from(facts)
        .outerjoin(
            FileRow,
            (FileRow.project_id == project_id)
            & FileRow.public_id.in_(files)
            & FileRow.deleted_at.is_(None),
        )
    )
    rows = result.all()  # at least one: the facts stand there without a file too
    found = [File(*row[2:]) for row in rows if row.id is not None]
    return References({file.public_id: file for file in found}, rows[0].open_jobs, rows[0].free)


async def lock_quota(session: AsyncSession, project_id: int) -> None:
    """Have every other submission of the project wait until this transaction ends.

    From here on `references` counts exactly.
    """
    await session.execute(select(func.pg_advisory_xact_lock(QUOTA_LOCKS, project_id)))


async def live_workers(session: AsyncSession) -> list[tuple[list[str], list[dict[str, Any]]]]:
    """(queues, devices) of each worker that was heard of lately and takes work."""
    age = func.make_interval(0, 0, 0, 0, 0, 0, WORKER_LIVE_S)
    rows = await session.execute(
        select(WorkerRow.queues, WorkerRow.devices).where(
            WorkerRow.heartbeat_at > func.clock_timestamp() - age,
            WorkerRow.drain_requested_at.is_(None),
        )
    )
    return [(queues, devices) for queues, devices in rows]
