"""A job's history: `seq` grows by one per job, without a hole, in the order of commits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, update

from core.db.tables import JobEventRow, JobRow
from core.ids import EVENT, new_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession


async def append(
    session: AsyncSession,
    job_id: int,
    *,
    kind: str,
    message: str,
    attempt: int | None = None,
    level: str = "info",
    type: str = "message",
    data: Mapping[str, Any] | None = None,
) -> JobEventRow | None:
    """Add an event. Given an `attempt`, None when that is not the job's current one any more.

    Counting up locks the job's row until the transaction ends, which is what makes the order of
    `seq` the order of commits: a reader that has seen 7 will never see a 6 appear.
    """
    counted = update(JobRow).where(JobRow.id == job_id)
    if attempt is not None:
        counted = counted.where(JobRow.attempt == attempt)
    taken = (
        await session.execute(
            counted.values(last_event_seq=JobRow.last_event_seq + 1)
            .returning(JobRow.last_event_seq, JobRow.attempt)
            .execution_options(synchronize_session=False)
        )
    ).one_or_none()
    if taken is None:
        return None
    row = JobEventRow(
        public_id=new_id(EVENT),
        job_id=job_id,
        seq=taken.last_event_seq,
        attempt=taken.attempt,
        kind=kind,
        message=message,
        level=level,
        type=type,
        data=dict(data or {}),
    )
    session.add(row)
    await session.flush()
    return row


async def list_events(
    session: AsyncSession,
    job_id: int,
    *,
    after: str | None = None,
    limit: int = 20,
    order: str = "desc",
    type: str | None = None,
    level: str | None = None,
    kinds: Sequence[str] | None = None,
) -> tuple[list[JobEventRow], bool] | None:
    """A page of events, newest first unless `order` is "asc", and whether more follow it.

    None: `after` is no event of this job.
    """
    query = select(JobEventRow).where(JobEventRow.job_id == job_id)
    if after is not None:
        seq = await seq_of(session, job_id, after)
        if seq is None:
            return None
        query = query.where(JobEventRow.seq < seq if order == "desc" else JobEventRow.seq > seq)
    if type is not None:
        query = query.where(JobEventRow.type == type)
    if level is not None:
        query = query.where(JobEventRow.level == level)
    if kinds is not None:
        query = query.where(JobEventRow.kind.in_(kinds))
    query = query.order_by(JobEventRow.seq.desc() if order == "desc" else JobEventRow.seq.asc())
    rows = list(await session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


async def events_after(
    session: AsyncSession, job_id: int, seq: int, limit: int = 500
) -> list[JobEventRow]:
    """What happened after event `seq`, oldest first: the step of a stream that follows a job."""
    return list(
        await session.scalars(
            select(JobEventRow)
            .where(JobEventRow.job_id == job_id, JobEventRow.seq > seq)
            .order_by(JobEventRow.seq)
            .limit(limit)
        )
    )


async def seq_of(session: AsyncSession, job_id: int, public_id: str) -> int | None:
    """The place of one event in its job's history; None: not one of this job's."""
    return await session.scalar(
        select(JobEventRow.seq).where(
            JobEventRow.job_id == job_id, JobEventRow.public_id == public_id
        )
    )


async def count(session: AsyncSession, job_id: int) -> int:
    """How many events a job has."""
    found = await session.scalar(
        select(func.count()).select_from(JobEventRow).where(JobEventRow.job_id == job_id)
    )
    return found or 0
