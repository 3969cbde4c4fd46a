"""Logged values: written once per step, read as a series that never moves under the reader."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import BigInteger, Double, Text

from core.db.tables import JobMetricRow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncSession

_RECORD = text("""
with fence as materialized (
  select id from jobs where id = :job_id and attempt = :attempt for share
)
insert into job_metrics (job_id, key, step, value, attempt)
select fence.id, point.key, point.step, point.value, :attempt
  from fence, unnest(:keys, :steps, :values) as point (key, step, value)
on conflict (job_id, key, step)
  do update set value = excluded.value, attempt = excluded.attempt, at = clock_timestamp()
  where job_metrics.attempt <= excluded.attempt
returning 1
""").bindparams(
    bindparam("keys", type_=ARRAY(Text)),
    bindparam("steps", type_=ARRAY(BigInteger)),
    bindparam("values", type_=ARRAY(Double)),
)

# The bucket's width is the smallest power of two that keeps the span within `resolution` buckets.
# Buckets are [n * width, (n + 1) * width), counted from step 0 whatever is asked for; so a longer
# series leaves every closed bucket alone, and when the width doubles two buckets become one whose
# points are a choice of theirs. Every point is one that was logged.
_SERIES = text("""
with asked as materialized (
  select key, step, value, at from job_metrics
   where job_id = :job_id
     and (cast(:keys as text[]) is null or key = any(cast(:keys as text[])))
     and (cast(:step_from as bigint) is null or step >= :step_from)
     and (cast(:step_to as bigint) is null or step <= :step_to)
), wide as (
  select cast(power(2, greatest(0, ceil(log(2.0,
           greatest(1, (max(step) + 1)::numeric / cast(:resolution as int)))))) as bigint)
           as width from asked
), placed as (
  select key, step, value, at,
         row_number() over (bucket order by step) as from_first,
         row_number() over (bucket order by step desc) as from_last,
         row_number() over (bucket order by value, step) as from_least,
         row_number() over (bucket order by value desc, step) as from_most
    from asked, wide
  window bucket as (partition by key, step / width)
)
select key, step, value, at from placed
 where 1 in (from_first, from_last, from_least, from_most)
 order by key, step
""").bindparams(bindparam("keys", type_=ARRAY(Text)))

_LATEST = text("""
select distinct on (key) key, step, value, at from job_metrics
 where job_id = :job_id order by key, step desc
""")


class Point(NamedTuple):
    step: int
    value: float
    at: datetime


async def record(
    session: AsyncSession,
    job_id: int,
    attempt: int,
    points: Sequence[tuple[int, Mapping[str, float]]],
) -> bool:
    """Store `(step, {key: value})` of an attempt; False: it is not the job's current one.

    A resumed attempt overwrites the steps that it trains again; an older attempt overwrites
    nothing.
    """
    # The last word on a (key, step) holds: one statement may not touch a row twice.
    flat = {(key, step): value for step, values in points for key, value in values.items()}
    if not flat:
        return True
    result = await session.execute(
        _RECORD,
        {
            "job_id": job_id,
            "attempt": attempt,
            "keys": [key for key, _ in flat],
            "steps": [step for _, step in flat],
            "values": [float(value) for value in flat.values()],
        },
    )
    return result.first() is not None


async def series(
    session: AsyncSession,
    job_id: int,
    keys: Sequence[str] | None = None,
    step_from: int | None = None,
    step_to: int | None = None,
    resolution: int = 500,
) -> dict[str, list[Point]]:
    """First, least, greatest and last point of each bucket, per key, in the order of steps.

    `resolution` is the most buckets there may be, so a key has at most four times as many points.
    Spikes survive, and points already drawn do not move when the series grows.
    """
    rows = await session.execute(
        _SERIES,
        {
            "job_id": job_id,
            "keys": None if keys is None else list(keys),
            "step_from": step_from,
            "step_to": step_to,
            "resolution": max(1, resolution),
        },
    )
    found: dict[str, list[Point]] = defaultdict(list)
    for key, step, value, at in rows:
        found[key].append(Point(step, value, at))
    return dict(found)


async def latest(session: AsyncSession, job_id: int) -> dict[str, Point]:
    """The newest point of each key."""
    rows = await session.execute(_LATEST, {"job_id": job_id})
    return {key: Point(step, value, at) for key, step, value, at in rows}


async def rows(session: AsyncSession, job_id: int) -> AsyncIterator[tuple[int, dict[str, float]]]:
    """Every step with its values, in order: what the result file is written from."""
    query = (
        select(JobMetricRow.step, JobMetricRow.key, JobMetricRow.value)
        .where(JobMetricRow.job_id == job_id)
        .order_by(JobMetricRow.step, JobMetricRow.key)
        .execution_options(yield_per=5000)
    )
    current: int | None = None
    values: dict[str, float] = {}
    async for step, key, value in await session.stream(query):
        if step != current:
            if current is not None:
                yield current, values
            current, values = step, {}
        values[key] = value
    if current is not None:
        yield current, values
