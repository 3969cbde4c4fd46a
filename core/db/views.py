"""Jobs as they are shown: one statement each, with the public ids of what they refer to."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003 - NamedTuple fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sqlalchemy import Double, and_, bindparam, case, cast, func, null, or_, select, tuple_
from sqlalchemy.orm import aliased

from core.db.tables import CheckpointRow, FileRow, JobRow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncSession


class JobView(NamedTuple):
    """A job row with names in place of keys. Times are aware datetimes."""

    id: int
    public_id: str
    model: str
    method: str
    suffix: str | None
    seed: int
    request: dict[str, Any]
    spec: dict[str, Any]
    resolved: dict[str, Any]
    metadata: dict[str, Any] | None
    integrations: list[dict[str, Any]] | None
    state: str
    attempt: int
    max_errors: int
    worker: str | None
    queue: str
    gpus: int
    priority: int
    run_after: datetime
    hold: bool
    cancel_requested_at: datetime | None
    pause_requested_at: datetime | None
    phase: str
    last_step: int
    total_steps: int | None
    epoch: float | None
    tokens_per_second: float | None
    seconds_remaining: float | None
    trained_tokens: int | None
    gpu_seconds: float
    peak_memory_bytes: int | None
    progress_at: datetime | None
    heartbeat_at: datetime | None
    started_at: datetime | None
    resumed_from_step: int | None
    facts: dict[str, Any] | None
    error: dict[str, Any] | None
    fine_tuned_model: str | None
    last_event_seq: int
    created_at: datetime
    finished_at: datetime | None
    training_file: str
    validation_file: str | None
    result_file: str | None
    final_checkpoint: str | None
    best_checkpoint: str | None
    position: int | None
    """Among the waiting jobs of its queue, from 1; None unless it waits."""


_training, _validation, _result = aliased(FileRow), aliased(FileRow), aliased(FileRow)
_final, _any, _ahead = aliased(CheckpointRow), aliased(CheckpointRow), aliased(JobRow)


def _best_first(checkpoint: Any) -> tuple[Any, Any]:
    """One without a validation loss never beats one that has it; then the newest is best."""
    loss = cast(checkpoint.metrics["valid_loss"].astext, Double)
    return loss.asc().nulls_last(), checkpoint.id.desc()


_best = (
    select(_any.public_id)
    .where(
        _any.job_id == JobRow.id,
        _any.kinds.contains(["export"]),
        _any.deleted_at.is_(None),
        _any.corrupt_at.is_(None),
    )
    .order_by(*_best_first(_any))
    .limit(1)
    .correlate(JobRow)
    .scalar_subquery()
)
_waiting = and_(JobRow.state == "queued", JobRow.hold.is_(False))
_position = (
    select(func.count() + 1)
    .where(
        _ahead.queue == JobRow.queue,
        _ahead.state == "queued",
        _ahead.hold.is_(False),
        or_(
            _ahead.priority > JobRow.priority,
            and_(
                _ahead.priority == JobRow.priority,
                tuple_(_ahead.run_after, _ahead.id) < tuple_(JobRow.run_after, JobRow.id),
            ),
        ),
    )
    .correlate(JobRow)
    .scalar_subquery()
)
_SHOWN_AS_IS = JobView._fields[: JobView._fields.index("training_file")]
_columns = [getattr(JobRow, "metadata_" if name == "metadata" else name) for name in _SHOWN_AS_IS]
_ended = JobRow.state.in_(("succeeded", "failed", "cancelled"))


def _view(position: ColumnElement[Any]) -> Any:
    # A job that never claimed has no checkpoints: the subquery is spared.
    best = case((JobRow.attempt > 0, _best), else_=null())
    return (
        select(
            *_columns,
            _training.public_id,
            _validation.public_id,
            _result.public_id,
            _final.public_id,
            best,
            position,
        )
        .join(_training, _training.id == JobRow.training_file_id)
        .outerjoin(_validation, _validation.id == JobRow.validation_file_id)
        .outerjoin(_result, _result.id == JobRow.result_file_id)
        .outerjoin(_final, _final.id == JobRow.final_checkpoint_id)
    )


_mine = JobRow.project_id == bindparam("project_id")
_ONE = _view(case((_waiting, _position), else_=null())).where(
    _mine, JobRow.public_id == bindparam("public_id")
)
_MANY = _view(null()).where(_mine)


async def job(session: AsyncSession, project_id: int, public_id: str) -> JobView | None:
    """One job of a project."""
    row = (
        await session.execute(_ONE, {"project_id": project_id, "public_id": public_id})
    ).one_or_none()
    return None if row is None else JobView(*row)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What a list of jobs is narrowed to. Times are unix seconds."""

    states: tuple[str, ...] | None = None
    model: str | None = None
    method: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    no_metadata: bool = False
    """Only jobs without any, as `metadata=null` asks for."""

    def conditions(self) -> list[ColumnElement[bool]]:
        made: list[ColumnElement[bool]] = []
        if self.states is not None:
            made.append(JobRow.state.in_(self.states))
        if self.model is not None:
            made.append(JobRow.model == self.model)
        if self.method is not None:
            made.append(JobRow.method == self.method)
        if self.created_after is not None:
            made.append(JobRow.created_at > func.to_timestamp(self.created_after))
        if self.created_before is not None:
            made.append(JobRow.created_at < func.to_timestamp(self.created_before))
        if self.metadata:
            made.append(JobRow.metadata_.contains(dict(self.metadata)))
        if self.no_metadata:
            made.append(or_(JobRow.metadata_.is_(None), JobRow.metadata_ == {}))
        return made


async def jobs(
    session: AsyncSession,
    project_id: int,
    *,
    where: JobFilter,
    after: str | None,
    limit: int,
    order: Literal["asc", "desc"],
) -> Sequence[JobView] | None:
    """A page of a project's jobs by age, beginning behind `after`; None if that is unknown.

    Queue positions are not counted here: they would cost one scan a row.
    """
    query = _MANY.where(*where.conditions())
    if after is not None:
        cursor = await session.scalar(
            select(JobRow.id).where(JobRow.project_id == project_id, JobRow.public_id == after)
        )
        if cursor is None:
            return None
        query = query.where(JobRow.id > cursor if order == "asc" else JobRow.id < cursor)
    query = query.order_by(JobRow.id.asc() if order == "asc" else JobRow.id.desc()).limit(limit)
    rows = await session.execute(query, {"project_id": project_id})
    return [JobView(*row) for row in rows]


class JobHead(NamedTuple):
    """What routes below a job need of it."""

    id: int
    state: str
    attempt: int
    last_event_seq: int


_HEAD = select(JobRow.id, JobRow.state, JobRow.attempt, JobRow.last_event_seq).where(
    _mine, JobRow.public_id == bindparam("public_id")
)


async def head(session: AsyncSession, project_id: int, public_id: str) -> JobHead | None:
    row = (
        await session.execute(_HEAD, {"project_id": project_id, "public_id": public_id})
    ).one_or_none()
    return None if row is None else JobHead(*row)


class Model(NamedTuple):
    """An export of a project: a final one or a checkpoint's, under a model name."""

    checkpoint: str
    checkpoint_id: int
    name: str
    job: str
    step: int
    prefix: str
    final: bool
    created_at: datetime
    spec: dict[str, Any]
    manifest: list[dict[str, Any]]
    fine_tuned_model: str | None
    resumable: bool
    """Whether its optimizer's state is still kept."""


_MODEL = (
    select(
        CheckpointRow.public_id,
        CheckpointRow.id,
        CheckpointRow.name,
        JobRow.public_id,
        CheckpointRow.step,
        CheckpointRow.prefix,
        CheckpointRow.id == JobRow.final_checkpoint_id,
        CheckpointRow.created_at,
        JobRow.spec,
        CheckpointRow.manifest,
        JobRow.fine_tuned_model,
        CheckpointRow.kinds.contains(["resume"]) & CheckpointRow.resume_dropped_at.is_(None),
    )
    .join(JobRow, JobRow.id == CheckpointRow.job_id)
    .where(
        _mine,
        CheckpointRow.kinds.contains(["export"]),
        CheckpointRow.deleted_at.is_(None),
        CheckpointRow.corrupt_at.is_(None),
    )
)


async def model(session: AsyncSession, project_id: int, name: str) -> Model | None:
    """The newest export of that name: a fine-tuned model's, a checkpoint's, or a checkpoint id."""
    row = (
        await session.execute(
            _MODEL.where(
                or_(
                    CheckpointRow.name == name,
                    CheckpointRow.public_id == name,
                    and_(
                        JobRow.fine_tuned_model == name,
                        CheckpointRow.id == JobRow.final_checkpoint_id,
                    ),
                )
            )
            .order_by(CheckpointRow.id.desc())
            .limit(1),
            {"project_id": project_id},
        )
    ).one_or_none()
    return None if row is None else Model(*row)


async def models(session: AsyncSession, project_id: int) -> list[Model]:
    """The final models of a project, newest first."""
    rows = await session.execute(
        _MODEL.where(CheckpointRow.id == JobRow.final_checkpoint_id).order_by(
            CheckpointRow.id.desc()
        ),
        {"project_id": project_id},
    )
    return [Model(*row) for row in rows]


async def queue_depths(session: AsyncSession) -> list[dict[str, Any]]:
    """Waiting and running jobs of every queue, over all projects; ages in seconds."""
    running = JobRow.state.in_(("starting", "running", "finishing"))
    waiting_age = func.extract("epoch", func.clock_timestamp() - JobRow.run_after)
    rows = await session.execute(
        select(
            JobRow.queue,
            func.count().filter(_waiting),
            func.count().filter(running),
            func.max(case((_waiting, waiting_age), else_=null())),
            func.coalesce(func.sum(case((running, JobRow.gpus), else_=0)), 0),
        )
        .where(~_ended)
        .group_by(JobRow.queue)
        .order_by(JobRow.queue)
    )
    return [
        {
            "queue": name,
            "waiting": waiting,
            "running": busy,
            "oldest_waiting_s": None if age is None else round(float(age), 1),
            "gpus_in_use": gpus,
        }
        for name, waiting, busy, age, gpus in rows
    ]


async def state_counts(session: AsyncSession) -> dict[tuple[str, str], int]:
    """Jobs by (queue, state), ended ones included, over all projects."""
    rows = await session.execute(
        select(JobRow.queue, JobRow.state, func.count()).group_by(JobRow.queue, JobRow.state)
    )
    return {(queue, state): count for queue, state, count in rows}


async def usage(session: AsyncSession, project_id: int) -> dict[str, Any]:
    """What a project has in use, in the units of its limits."""
    mine = JobRow.project_id == project_id
    running = JobRow.state.in_(("starting", "running", "finishing"))
    jobs_open, jobs_running, gpu_seconds = (
        await session.execute(
            select(
                func.count().filter(~_ended),
                func.count().filter(running),
                func.coalesce(func.sum(JobRow.gpu_seconds), 0.0),
            ).where(mine)
        )
    ).one()
    stored = await session.scalar(
        select(func.coalesce(func.sum(FileRow.size_bytes), 0)).where(
            FileRow.project_id == project_id, FileRow.deleted_at.is_(None)
        )
    )
    return {
        "queued_jobs": jobs_open,
        "concurrent_jobs": jobs_running,
        "gpu_seconds": gpu_seconds,
        "storage_bytes": int(stored or 0),
    }


async def result(session: AsyncSession, job: int) -> CheckpointRow | None:
    """The job's final export; None before it succeeded, and after that model was deleted."""
    found: CheckpointRow | None = await session.scalar(
        select(CheckpointRow)
        .join(JobRow, JobRow.final_checkpoint_id == CheckpointRow.id)
        .where(JobRow.id == job, CheckpointRow.deleted_at.is_(None))
    )
    return found
