"""What an attempt reads before it trains, and the result file that it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, or_, select
from sqlalchemy.orm import aliased

from core.db.tables import CheckpointRow, FileRow, JobRow, ProjectRow

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.ext.asyncio import AsyncSession

    from core.db.claims import Claim


class Inputs(NamedTuple):
    """Where an attempt's data lie in the store, and the names that its result gets."""

    training_key: str
    training_gone: bool
    """Its owner has deleted it since the job was created."""
    validation_key: str | None
    validation_gone: bool
    project: str
    suffix: str | None


async def inputs(session: AsyncSession, claim: Claim) -> Inputs:
    """The job's files and names."""
    training, validation = aliased(FileRow), aliased(FileRow)
    row = (
        await session.execute(
            select(
                training.store_key,
                training.deleted_at.is_not(None),
                validation.store_key,
                validation.deleted_at.is_not(None),
                ProjectRow.name,
                JobRow.suffix,
            )
            .select_from(JobRow)
            .join(ProjectRow, ProjectRow.id == JobRow.project_id)
            .join(training, training.id == JobRow.training_file_id)
            .outerjoin(validation, validation.id == JobRow.validation_file_id)
            .where(JobRow.id == claim.job_id)
        )
    ).one()
    return Inputs(*row)


async def add_result_file(
    session: AsyncSession,
    claim: Claim,
    *,
    public_id: str,
    store_key: str,
    sha256: str,
    size_bytes: int,
) -> int:
    """Insert the row of a metrics CSV that lies in the store; returns its id."""
    row = FileRow(
        public_id=public_id,
        project_id=claim.project_id,
        filename=f"{claim.public_id}_metrics.csv",
        purpose="fine-tune-results",
        status="processed",
        size_bytes=size_bytes,
        sha256=sha256,
        store_key=store_key,
        content_type="text/csv",
        suffix=".csv",
    )
    session.add(row)
    await session.flush()
    return row.id


async def named_prefixes(session: AsyncSession, prefixes: Collection[str]) -> set[str]:
    """Those of `prefixes` that a checkpoint's row names."""
    rows = await session.scalars(
        select(CheckpointRow.prefix).where(CheckpointRow.prefix.in_(prefixes))
    )
    return set(rows)


async def dropped_resumes(session: AsyncSession, prefixes: Collection[str]) -> set[str]:
    """Those of `prefixes` whose checkpoint gave up its resume half."""
    rows = await session.scalars(
        select(CheckpointRow.prefix).where(
            CheckpointRow.prefix.in_(prefixes), CheckpointRow.resume_dropped_at.is_not(None)
        )
    )
    return set(rows)


async def named_files(session: AsyncSession, keys: Collection[str]) -> set[str]:
    """Those of `keys` that a file's row names, deleted or not."""
    return set(await session.scalars(select(FileRow.store_key).where(FileRow.store_key.in_(keys))))


async def lively_jobs(
    session: AsyncSession, public_ids: Collection[str], *, within_s: float
) -> set[str]:
    """Those jobs that a worker holds, or held within the last `within_s` seconds."""
    since = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, within_s)
    rows = await session.scalars(
        select(JobRow.public_id).where(
            JobRow.public_id.in_(public_ids),
            or_(JobRow.owner.is_not(None), JobRow.heartbeat_at > since),
        )
    )
    return set(rows)


async def project_checkpoint(
    session: AsyncSession, project_id: int, public_id: str
) -> CheckpointRow | None:
    """A checkpoint of any job of one project, unless it was deleted."""
    return await session.scalar(
        select(CheckpointRow)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(
            CheckpointRow.public_id == public_id,
            CheckpointRow.deleted_at.is_(None),
            JobRow.project_id == project_id,
        )
    )


async def file_exists(session: AsyncSession, public_id: str) -> bool:
    """Whether a file's row was committed."""
    found = await session.scalar(select(FileRow.id).where(FileRow.public_id == public_id))
    return found is not None
