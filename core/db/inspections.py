"""A dry run's questions, and the workers' answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.orm import aliased

from core.db.tables import FileRow, InspectionRow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncSession

TAKEN_FOR_S = 60.0
"""Who took a question and says nothing for so long is taken for dead."""
KEPT_S = 600.0


@dataclass(frozen=True)
class Question:
    """What is to be looked at.

    Attributes:
        spec: the resolved `TrainingSpec`, as JSON.
        training_key, validation_key: where the files' bytes lie in the store.
    """

    id: int
    spec: dict[str, Any]
    training_key: str
    validation_key: str | None


async def ask(
    session: AsyncSession,
    *,
    project_id: int,
    queue: str,
    spec: Mapping[str, Any],
    training_file_id: int,
    validation_file_id: int | None,
) -> int:
    """Put a question to the workers of a queue; returns its id."""
    asked = insert(InspectionRow).values(
        project_id=project_id,
        queue=queue,
        spec=dict(spec),
        training_file_id=training_file_id,
        validation_file_id=validation_file_id,
    )
    found: int | None = await session.scalar(asked.returning(InspectionRow.id))
    assert found is not None
    return found


async def take(session: AsyncSession, queues: Sequence[str], within_s: float) -> Question | None:
    """The oldest question that nobody works at and that was asked no longer ago than `within_s`."""
    waiting = (
        select(InspectionRow.id)
        .where(
            InspectionRow.answer.is_(None),
            InspectionRow.queue.in_(queues),
            InspectionRow.asked_at > _ago(within_s),
            or_(InspectionRow.taken_at.is_(None), InspectionRow.taken_at < _ago(TAKEN_FOR_S)),
        )
        .order_by(InspectionRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    taken = await session.scalar(
        update(InspectionRow)
        .where(InspectionRow.id == waiting)
        .values(taken_at=func.clock_timestamp())
        .returning(InspectionRow.id)
        .execution_options(synchronize_session=False)
    )
    if taken is None:
        return None
    training, validation = aliased(FileRow), aliased(FileRow)
    row = (
        await session.execute(
            select(InspectionRow.id, InspectionRow.spec, training.store_key, validation.store_key)
            .join(training, training.id == InspectionRow.training_file_id)
            .outerjoin(validation, validation.id == InspectionRow.validation_file_id)
            .where(InspectionRow.id == taken)
        )
    ).one()
    return Question(*row)


async def answer(session: AsyncSession, question_id: int, said: Mapping[str, Any]) -> None:
    """Answer a question, unless somebody has."""
    await session.execute(
        update(InspectionRow)
        .where(InspectionRow.id == question_id, InspectionRow.answer.is_(None))
        .values(answer=dict(said))
        .execution_options(synchronize_session=False)
    )


async def read(session: AsyncSession, question_id: int) -> dict[str, Any] | None:
    """What was answered; None: nothing yet."""
    found: dict[str, Any] | None = await session.scalar(
        select(InspectionRow.answer).where(InspectionRow.id == question_id)
    )
    return found


async def forget(session: AsyncSession) -> int:
    """Remove questions that nobody waits for any more; how many."""
    gone = await session.execute(
        delete(InspectionRow)
        .where(InspectionRow.asked_at < _ago(KEPT_S))
        .returning(InspectionRow.id)
        .execution_options(synchronize_session=False)
    )
    return len(gone.all())


def _ago(seconds: float) -> ColumnElement[Any]:
    return func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)
