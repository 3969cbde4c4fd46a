"""What a job's trainers printed, in chunks; the oldest go when there is too much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select, text

from core.db.tables import JobLogRow

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

CHUNK_CHARS = 65_536
KEPT_CHUNKS = 256
"""At most 16 Mi characters of a job's output are kept: a trainer that floods loses its own past."""

_APPEND = text("""
with fence as materialized (
  select id from jobs where id = :job_id and attempt = :attempt for no key update
), added as (
  insert into job_logs (job_id, seq, attempt, text)
  select fence.id,
         coalesce((select max(seq) from job_logs where job_id = fence.id), 0) + 1, :attempt, :text
    from fence
  returning seq
), dropped as (
  delete from job_logs using added
   where job_id = :job_id and job_logs.seq <= added.seq - :kept
)
select seq from added
""")


async def append(session: AsyncSession, job_id: int, attempt: int, output: str) -> int | None:
    """Store a chunk; returns its `seq`. None: the attempt is not the job's current one.

    Longer text is stored as several chunks; the last one's `seq` is returned.
    """
    clean = output.replace("\x00", "\N{REPLACEMENT CHARACTER}")  # Postgres text has no NUL
    seq: int | None = None
    for start in range(0, max(1, len(clean)), CHUNK_CHARS):
        seq = await session.scalar(
            _APPEND,
            {
                "job_id": job_id,
                "attempt": attempt,
                "text": clean[start : start + CHUNK_CHARS],
                "kept": KEPT_CHUNKS,
            },
        )
    return seq


async def after(
    session: AsyncSession,
    job_id: int,
    seq: int = 0,
    *,
    attempt: int | None = None,
    limit: int = 100,
) -> list[JobLogRow]:
    """Chunks after `seq`, oldest first."""
    query = select(JobLogRow).where(JobLogRow.job_id == job_id, JobLogRow.seq > seq)
    if attempt is not None:
        query = query.where(JobLogRow.attempt == attempt)
    return list(await session.scalars(query.order_by(JobLogRow.seq).limit(limit)))


async def tail(
    session: AsyncSession, job_id: int, chunks: int = 10, *, attempt: int | None = None
) -> list[JobLogRow]:
    """The newest chunks, oldest first."""
    query = select(JobLogRow).where(JobLogRow.job_id == job_id)
    if attempt is not None:
        query = query.where(JobLogRow.attempt == attempt)
    found = await session.scalars(query.order_by(JobLogRow.seq.desc()).limit(chunks))
    return list(found)[::-1]
