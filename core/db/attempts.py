"""What an attempt reads before it trains, and the result file that it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import aliased

from core.db.tables import FileRow, JobRow, ProjectRow

if TYPE_CHECKING:
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
