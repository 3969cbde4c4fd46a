"""What a submission has to know before it may insert a job, and the insert: a statement each.

On psycopg directly: this is where every job passes, and putting a statement together would cost
more than running it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import func, select

from core.db.tables import WorkerRow
from core.db.views import JobView

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from core.db.engine import AsyncSession, Driver
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


_REFERENCES: Final = f"""
select facts.open_jobs, facts.free, f.id, f.public_id, f.purpose, f.status, f.status_details,
       coalesce(f.expires_at <= clock_timestamp(), false), f.sha256, f.size_bytes, f.suffix,
       f.format, f.rows, f.labels
  from (select (select count(*) from jobs
                 where project_id = %(project)s::bigint
                   and state not in ('succeeded', 'failed', 'cancelled')) as open_jobs,
               pg_try_advisory_xact_lock_shared({QUOTA_LOCKS}, %(project)s::int) as free,
               case when %(lock)s::bigint is not null
                    then pg_advisory_xact_lock_shared(%(lock)s::bigint) is null end) as facts
  left join files f on f.project_id = %(project)s::bigint
                   and f.public_id = any(%(files)s::text[]) and f.deleted_at is null
"""


async def references(
    driver: Driver, project_id: int, files: Sequence[str], lock: int | None = None
) -> References:
    """The files of a submission, as far as they exist, and how many jobs are open.

    Takes the project's quota lock in shared mode, and `lock` too, until the transaction ends.
    """
    values = {"project": project_id, "files": list(files), "lock": lock}
    rows = await (await driver.execute(_REFERENCES, values, prepare=True)).fetchall()
    # At least one row: the facts stand there without a file too.
    found = [File(*row[2:]) for row in rows if row[2] is not None]
    return References({file.public_id: file for file in found}, rows[0][0], rows[0][1])


async def lock_quota(driver: Driver, project_id: int) -> None:
    """Have every other submission of the project wait until this transaction ends.

    From here on `references` counts exactly.
    """
    await driver.execute(
        "select pg_advisory_xact_lock(%s, %s::int)", (QUOTA_LOCKS, project_id), prepare=True
    )


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


_JSON: Final = frozenset({"request", "spec", "resolved", "metadata", "integrations"})
_GIVEN: Final = {
    "public_id": "text",
    "project_id": "bigint",
    "model": "text",
    "method": "text",
    "suffix": "text",
    "seed": "bigint",
    "training_file_id": "bigint",
    "validation_file_id": "bigint",
    "request": "jsonb",
    "spec": "jsonb",
    "resolved": "jsonb",
    "metadata": "jsonb",
    "integrations": "jsonb",
    "max_errors": "int",
    "queue": "text",
    "gpus": "int",
    "priority": "int",
    "hold": "boolean",
    "total_steps": "bigint",
}
_SHOWN: Final = JobView._fields[: JobView._fields.index("training_file")]
_FILLED_IN: Final = tuple(name for name in _SHOWN if name not in _GIVEN)

# The lock on the files is the one that a delete conflicts with, and whoever waited for it sees the
# row as it is then: a file that went after it was looked at leaves no job behind.
_INSERT: Final = f"""
with fit as (
  select id from files
   where id in (%(training_file_id)s::bigint, %(validation_file_id)s::bigint)
     and deleted_at is null and (expires_at is null or expires_at > clock_timestamp())
     for key share
), job as (
  insert into jobs ({", ".join(_GIVEN)})
  select {", ".join(f"%({name})s::{kind}" for name, kind in _GIVEN.items())}
   where (select count(*) from fit)
         = 1 + (%(validation_file_id)s::bigint <> %(training_file_id)s::bigint is true)::int
  returning {", ".join(_FILLED_IN)}
)"""
_INSERT_ONLY: Final = f"{_INSERT}\nselect * from job"
_INSERT_REMEMBERED: Final = f"""{_INSERT}, told as (
  insert into idempotency_keys
    (project_id, route, body_sha256, retry_count, status_code, response)
  select %(project_id)s::bigint, %(told_route)s, %(told_body)s, %(told_count)s::int, 200,
         jsonb_build_object('id', %(public_id)s::text)
    from job
)
select * from job"""


async def insert_job(
    driver: Driver,
    *,
    training_file: str,
    validation_file: str | None,
    attempt: Attempt | None = None,
    **given: Any,
) -> JobView | None:
    """Add a job and return it as it is shown; None: a file of it is gone by now.

    Its first event and, unless it is held, its outbox row are written by the table's trigger. A
    retry of `attempt`, which has no idempotency key, will find that it made this job.
    """
    values = {name: _plain(name, given[name]) for name in _GIVEN}
    if attempt is None:
        cursor = await driver.execute(_INSERT_ONLY, values, prepare=True)
    else:
        values |= {
            "told_route": attempt.route,
            "told_body": attempt.body_sha256,
            "told_count": attempt.retry_count,
        }
        cursor = await driver.execute(_INSERT_REMEMBERED, values, prepare=True)
    row = await cursor.fetchone()
    if row is None:
        return None
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


_WARN: Final = """
with counted as (
  update jobs set last_event_seq = last_event_seq + cardinality(%(messages)s::text[])
   where id = %(job)s::bigint
  returning id, last_event_seq - cardinality(%(messages)s::text[]) as before
)
insert into job_events (public_id, job_id, seq, attempt, level, kind, message, data)
select new_public_id('ftevent-'), counted.id, counted.before + said.n, 0, 'warn', 'warning',
       said.message, said.data
  from counted, unnest(%(messages)s::text[], %(data)s::jsonb[]) with ordinality
                as said(message, data, n)
"""


async def warn(driver: Driver, job_id: int, warnings: Sequence[Mapping[str, Any]]) -> None:
    """Add one event for each warning, `{"code", "path", "message"}`, to a job just inserted."""
    data = [{"code": warning["code"], "param": warning["path"]} for warning in warnings]
    values = {
        "job": job_id,
        "messages": [warning["message"] for warning in warnings],
        "data": [json.dumps(each, ensure_ascii=False) for each in data],
    }
    await driver.execute(_WARN, values, prepare=True)


def _plain(name: str, value: Any) -> Any:
    if name not in _JSON or value is None:
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
