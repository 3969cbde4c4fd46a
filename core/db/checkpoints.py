"""Published checkpoints. A row names a complete, unchanging set of files, or does not exist.

Reach a job's checkpoints through its row, which `JobRepository` gives to its own project only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ColumnElement,
    Double,
    cast,
    exists,
    func,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import aliased

from core.db import claims
from core.db.tables import CheckpointRow, JobRow
from core.ids import CHECKPOINT, new_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession

    from core.db.claims import Claim

RESUMES_KEPT = 2


async def insert(
    session: AsyncSession,
    claim: Claim,
    *,
    step: int,
    kinds: Sequence[str],
    prefix: str,
    manifest: Sequence[Mapping[str, Any]],
    size_bytes: int,
    metrics: Mapping[str, float],
    name: str,
    final: bool = False,
) -> CheckpointRow | None:
    """Make a checkpoint exist, after its files and its manifest do; None: fenced.

    Said twice for the same step, it is one row: the second time may add `final` and metrics.
    Answers a request for a checkpoint, if there is one.
    """
    if not await claims.holds(session, claim):
        return None
    new = upsert(CheckpointRow).values(
        public_id=new_id(CHECKPOINT),
        job_id=claim.job_id,
        attempt=claim.attempt,
        step=step,
        kinds=list(kinds),
        prefix=prefix,
        manifest=[dict(entry) for entry in manifest],
        size_bytes=size_bytes,
        metrics=dict(metrics),
        name=name,
        final=final,
    )
    row = await session.scalar(
        new.on_conflict_do_update(
            index_elements=["job_id", "attempt", "step"],
            set_={
                "final": or_(CheckpointRow.final, new.excluded.final),
                "metrics": CheckpointRow.metrics.concat(new.excluded.metrics),
            },
        ).returning(CheckpointRow),
        execution_options={"populate_existing": True},
    )
    await session.execute(
        update(JobRow)
        .where(JobRow.id == claim.job_id, JobRow.checkpoint_requested_at.is_not(None))
        .values(checkpoint_requested_at=None)
        .execution_options(synchronize_session=False)
    )
    return row


async def list_checkpoints(
    session: AsyncSession,
    job_id: int,
    *,
    after: str | None = None,
    limit: int = 10,
    order: str = "desc",
    kind: str | None = None,
) -> tuple[list[CheckpointRow], bool] | None:
    """A page of a job's checkpoints, newest first unless "asc"; None: `after` is none of them."""
    query = select(CheckpointRow).where(
        CheckpointRow.job_id == job_id, CheckpointRow.deleted_at.is_(None)
    )
    if kind is not None:
        query = query.where(CheckpointRow.kinds.contains([kind]))
    if after is not None:
        last = await session.scalar(
            select(CheckpointRow.id).where(
                CheckpointRow.job_id == job_id, CheckpointRow.public_id == after
            )
        )
        if last is None:
            return None
        query = query.where(CheckpointRow.id < last if order == "desc" else CheckpointRow.id > last)
    query = query.order_by(CheckpointRow.id.desc() if order == "desc" else CheckpointRow.id.asc())
    rows = list(await session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


async def get(session: AsyncSession, job_id: int, name: str) -> CheckpointRow | None:
    """One checkpoint of a job: by id, or as `latest`, `best`, `step-<n>`.

    `best` has the lowest `valid_loss`; without any, the newest export is taken for the best.
    """
    query = select(CheckpointRow).where(
        CheckpointRow.job_id == job_id, CheckpointRow.deleted_at.is_(None)
    )
    newest = CheckpointRow.step.desc(), CheckpointRow.id.desc()
    if name == "latest":
        query = query.where(_has("export"))
    elif name == "best":
        loss = cast(CheckpointRow.metrics["valid_loss"].astext, Double)
        query = query.where(_has("export")).order_by(loss.asc().nulls_last())
    elif name.startswith("step-") and name[5:].isdecimal() and len(name) < 24:
        query = query.where(CheckpointRow.step == int(name[5:]))
    else:
        query = query.where(CheckpointRow.public_id == name)
    return await session.scalar(query.order_by(*newest).limit(1))


async def resumable(session: AsyncSession, job_id: int) -> list[CheckpointRow]:
    """Checkpoints that a run could continue from, the most advanced first.

    Verify the files' hashes before any load; call `mark_corrupt` and take the next when they fail.
    """
    rows = await session.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.job_id == job_id, *_resumable())
        .order_by(CheckpointRow.step.desc(), CheckpointRow.id.desc())
    )
    return list(rows)


async def newest_resumable(session: AsyncSession, job_id: int) -> CheckpointRow | None:
    """The first of `resumable`."""
    found = await resumable(session, job_id)
    return found[0] if found else None


async def mark_corrupt(session: AsyncSession, checkpoint_id: int) -> None:
    """Its bytes do not match its manifest: never resume from it again."""
    await _stamp(session, checkpoint_id, "corrupt_at")


async def retention_candidates(
    session: AsyncSession, job_id: int, keep: int = RESUMES_KEPT
) -> list[CheckpointRow]:
    """Checkpoints whose resume half may go: all but the `keep` most advanced good ones."""
    return (await resumable(session, job_id))[max(1, keep) :]


async def mark_resume_dropped(session: AsyncSession, checkpoint_id: int) -> None:
    """Its resume half is about to be deleted from the store; its export stays."""
    await _stamp(session, checkpoint_id, "resume_dropped_at")


async def unresumable_ended(session: AsyncSession, limit: int = 100) -> list[CheckpointRow]:
    """Resume halves of jobs that ended well or were cancelled, but for each job's newest.

    The job itself will not go on; another may start from it with its optimizer.
    """
    newer = aliased(CheckpointRow)
    rows = await session.scalars(
        select(CheckpointRow)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(
            JobRow.state.in_(("succeeded", "cancelled")),
            *_resumable(),
            exists().where(
                newer.job_id == CheckpointRow.job_id,
                tuple_(newer.step, newer.id) > tuple_(CheckpointRow.step, CheckpointRow.id),
                *_resumable(newer),
            ),
        )
        .order_by(CheckpointRow.id)
        .limit(limit)
    )
    return list(rows)


def _has(kind: str) -> ColumnElement[bool]:
    return CheckpointRow.kinds.contains([kind])


def _resumable(row: Any = CheckpointRow) -> tuple[ColumnElement[bool], ...]:
    return (
        row.kinds.contains(["resume"]),
        row.corrupt_at.is_(None),
        row.resume_dropped_at.is_(None),
        row.deleted_at.is_(None),
    )


async def _stamp(session: AsyncSession, checkpoint_id: int, column: str) -> None:
    await session.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint_id)
        .values({column: func.coalesce(getattr(CheckpointRow, column), text("clock_timestamp()"))})
        .execution_options(synchronize_session=False)
    )
