"""What a submission has to know before it may insert a job, in one statement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Integer,
    Text,
    any_,
    bindparam,
    cast,
    func,
    insert,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from core.db.tables import FileRow, IdempotencyRow, JobRow, WorkerRow
from core.db.views import JobView

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncSession

    from core.db.idempotency import Attempt

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


def _references(*also: ColumnElement[Any]) -> Select[Any]:
    """Built once: on this path, putting a statement together costs more than running it."""
    project = bindparam("project_id", type_=BigInteger)
    facts = select(
        select(func.count())
        .select_from(JobRow)
        .where(
            JobRow.project_id == project,
            JobRow.state.not_in(("succeeded", "failed", "cancelled")),
        )
        .scalar_subquery()
        .label("open_jobs"),
        func.pg_try_advisory_xact_lock_shared(
            literal_column(str(QUOTA_LOCKS)), cast(project, Integer)
        ).label("free"),
        *also,
    ).subquery()
    return (
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
            (FileRow.project_id == project)
            & (FileRow.public_id == any_(bindparam("files", type_=ARRAY(Text))))
            & FileRow.deleted_at.is_(None),
        )
    )


_PLAIN = _references()
_FIRST = _references(func.pg_advisory_xact_lock_shared(bindparam("lock", type_=BigInteger)))


async def references(
    session: AsyncSession, project_id: int, files: Sequence[str], lock: int | None = None
) -> References:
    """The files of a submission, as far as they exist, and how many jobs are open.

    Takes the project's quota lock in shared mode, and `lock` too, until the transaction ends.
    """
    values: dict[str, Any] = {"project_id": project_id, "files": list(files)}
    if lock is None:
        result = await session.execute(_PLAIN, values)
    else:
        result = await session.execute(_FIRST, values | {"lock": lock})
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


_GIVEN = (
    "public_id",
    "project_id",
    "model",
    "method",
    "suffix",
    "seed",
    "training_file_id",
    "validation_file_id",
    "request",
    "spec",
    "resolved",
    "metadata",
    "integrations",
    "max_errors",
    "queue",
    "gpus",
    "priority",
    "hold",
    "total_steps",
)
_SHOWN = JobView._fields[: JobView._fields.index("training_file")]
_FILLED_IN = tuple(name for name in _SHOWN if name not in _GIVEN)


def _values(table: Any, names: Sequence[str], prefix: str) -> dict[str, Any]:
    return {name: bindparam(f"{prefix}{name}", type_=table.c[name].type) for name in names}


_JOBS: Any = JobRow.__table__
_ANSWERED: Any = IdempotencyRow.__table__
_REMEMBERED = ("project_id", "route", "body_sha256", "retry_count", "status_code", "response")
_INSERT = (
    insert(_JOBS)
    .values(_values(_JOBS, _GIVEN, "job_"))
    .returning(*(_JOBS.c[name] for name in _FILLED_IN))
)
_INSERT_REMEMBERED = _INSERT.add_cte(
    insert(_ANSWERED).values(_values(_ANSWERED, _REMEMBERED, "told_")).cte("told")
)


async def insert_job(
    session: AsyncSession,
    *,
    training_file: str,
    validation_file: str | None,
    attempt: Attempt | None = None,
    **given: Any,
) -> JobView:
    """Add a job and return it as it is shown: one statement.

    Its first event and, unless it is held, its outbox row are written by the table's trigger. A
    retry of `attempt`, which has no idempotency key, will find that it made this job.
    """
    values = {f"job_{name}": given[name] for name in _GIVEN}
    if attempt is None:
        row = (await session.execute(_INSERT, values)).one()
    else:
        told = {
            "told_project_id": attempt.project_id,
            "told_route": attempt.route,
            "told_body_sha256": attempt.body_sha256,
            "told_retry_count": attempt.retry_count,
            "told_status_code": 200,
            "told_response": {"id": given["public_id"]},
        }
        row = (await session.execute(_INSERT_REMEMBERED, values | told)).one()
    return JobView(
        **{name: given[name] for name in _SHOWN if name in given},
        **dict(zip(_FILLED_IN, row, strict=True)),
        training_file=training_file,
        validation_file=validation_file,
        result_file=None,
        final_checkpoint=None,
        best_checkpoint=None,
        position=None,
    )
