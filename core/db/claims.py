"""Taking a job and keeping it: lease, fencing token, and every write of its holder.

A claim adds one to `attempt`, draws a fresh random `owner`, and holds for `ttl_s`. Every later
write repeats all of it: id, attempt, owner and a lease that is still alive by the *database's*
clock. A write that no longer holds them touches no row, and its caller learns that it is fenced:
kill the trainer, write nothing more.

`clock_timestamp()` throughout, never `now()`: `now()` is the transaction's start, so a statement
that waited for a row lock would compare against a past moment and let a dead lease through.
Source of the shape: dstack's pipelines (`lock_token`), with an attempt number beside it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import CursorResult, Row, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncSession

HALF_LIFE_S = 86_400.0
"""After a day, GPU time that a project used weighs half."""
HEAD_START_S = 60.0
"""Charged for a running job from its first moment, or a burst of claims would see no usage yet
and all go to the project that asked first."""

FENCE = {
    "id": "j.id = :id",
    "attempt": "j.attempt = :attempt",
    "owner": "j.owner = :owner",
    "lease": "j.lease_until > clock_timestamp()",
}
"""What every write of a lease holder repeats. The tests remove each term and see a failure."""


@dataclass(frozen=True)
class Claim:
    """One attempt at one job, and the token that its writes must show."""

    job_id: int
    public_id: str
    project_id: int
    attempt: int
    owner: str
    queue: str
    model: str
    spec: dict[str, Any]
    request: dict[str, Any]
    resolved: dict[str, Any]
    gpus: int
    seed: int
    training_file_id: int
    validation_file_id: int | None
    last_step: int
    gpu_seconds: float

    @property
    def fence(self) -> dict[str, Any]:
        return {"id": self.job_id, "attempt": self.attempt, "owner": self.owner}


@dataclass(frozen=True)
class Progress:
    """What a beat may say besides "alive". None leaves the row's value as it is."""

    phase: str | None = None
    total_steps: int | None = None
    epoch: float | None = None
    tokens_per_second: float | None = None
    seconds_remaining: float | None = None
    trained_tokens: int | None = None
    peak_memory_bytes: int | None = None
    resumed_from_step: int | None = None
    facts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Orders:
    """What the lease holder is asked for.

    Attributes:
        checkpoint: when a checkpoint was last asked for; obey each value once. None again as soon
            as a checkpoint's row exists.
    """

    cancel: bool
    pause: bool
    checkpoint: datetime | None


@dataclass(frozen=True)
class Reaped:
    """A job whose lease had lapsed, and what became of it."""

    job_id: int
    public_id: str
    attempt: int
    state: str
    worker: str | None


def _fence() -> str:
    return " and ".join(FENCE.values())


# Priority; then what the project used (decayed, plus what runs now) per unit of weight; then a
# base model that the worker already holds; then age. LockRows sits below Limit in the plan, so
# rows are locked one by one until one is free: a competing claim costs a skip, never a wait.
_CLAIM = """
with usage as materialized (
  select project_id,
         sum(gpus * (extract(epoch from clock_timestamp() - started_at) + :head_start)) as running
    from jobs where owner is not null group by project_id
), best as (
  select j.id
    from jobs j
    join projects p on p.id = j.project_id
    left join usage u on u.project_id = j.project_id
   where j.state = 'queued' and j.queue = any(:queues) and j.gpus <= :gpus_free
     and not j.hold and j.run_after <= clock_timestamp()
     and j.cancel_requested_at is null and j.pause_requested_at is null
   order by j.priority desc,
            (p.gpu_usage * power(0.5, greatest(0, extract(epoch from
               clock_timestamp() - p.gpu_usage_at)) / :half_life) + coalesce(u.running, 0))
              / greatest(p.weight, 1e-6),
            (j.model = any(:cached_models)) desc,
            j.run_after, j.id
   limit 1 for update of j skip locked
)
update jobs j
   set state = 'starting', attempt = j.attempt + 1, owner = :owner, worker = :worker,
       lease_until = clock_timestamp() + make_interval(secs => :ttl_s),
       started_at = clock_timestamp(), heartbeat_at = clock_timestamp(), error = null,
       progress_at = null, tokens_per_second = null, seconds_remaining = null,
       resumed_from_step = null
  from best where j.id = best.id
returning j.id as job_id, j.public_id, j.project_id, j.attempt, j.owner, j.queue, j.model, j.spec,
          j.request, j.resolved, j.gpus, j.seed, j.training_file_id, j.validation_file_id,
          j.last_step, j.gpu_seconds
"""

_SPENT = "j.gpus * extract(epoch from clock_timestamp() - j.heartbeat_at)"

_BEAT = """
update jobs j
   set lease_until = clock_timestamp() + make_interval(secs => :ttl_s),
       gpu_seconds = j.gpu_seconds + {spent},
       heartbeat_at = clock_timestamp(),
       last_step = greatest(j.last_step, :step),
       lost_count = case when :step > j.last_step then 0 else j.lost_count end,
       progress_at = case when :step > j.last_step then clock_timestamp() else j.progress_at end,
       phase = case when j.cancel_requested_at is not null then 'cancelling'
                    when j.pause_requested_at is not null then 'pausing'
                    else coalesce(:phase, j.phase) end,
       total_steps = coalesce(:total_steps, j.total_steps),
       epoch = coalesce(:epoch, j.epoch),
       tokens_per_second = coalesce(:tokens_per_second, j.tokens_per_second),
       seconds_remaining = coalesce(:seconds_remaining, j.seconds_remaining),
       trained_tokens = coalesce(:trained_tokens, j.trained_tokens),
       peak_memory_bytes = greatest(:peak_memory_bytes, j.peak_memory_bytes),
       resumed_from_step = coalesce(:resumed_from_step, j.resumed_from_step),
       facts = coalesce(:facts, j.facts)
 where {fence} and j.state in ('starting', 'running', 'finishing')
returning j.cancel_requested_at is not null as cancel, j.pause_requested_at is not null as pause,
          j.checkpoint_requested_at as checkpoint
"""

_MOVE = "update jobs j set state = :to_state where {fence} and j.state = :from_state returning 1"

# Ends an attempt and charges the project for it: `{sets}` and `{where}` say which end.
_END = """
with ended as (
  update jobs j
     set owner = null, lease_until = null,
         gpu_seconds = j.gpu_seconds + {spent}, heartbeat_at = clock_timestamp(), {sets}
   where {fence} and {where}
  returning j.project_id, j.state,
            j.gpus * extract(epoch from clock_timestamp() - j.started_at) as spent
), charged as (
  update projects p
     set gpu_usage = p.gpu_usage * power(0.5, greatest(0, extract(epoch from
           clock_timestamp() - p.gpu_usage_at)) / :half_life) + ended.spent,
         gpu_usage_at = clock_timestamp()
    from ended where p.id = ended.project_id
)
select state from ended
"""

_FINISH_SETS = """
  state = 'succeeded', final_checkpoint_id = :final_checkpoint_id,
  fine_tuned_model = :fine_tuned_model, result_file_id = :result_file_id,
  trained_tokens = coalesce(:trained_tokens, j.trained_tokens),
  peak_memory_bytes = greatest(:peak_memory_bytes, j.peak_memory_bytes),
  seconds_remaining = 0
"""

_FAIL_SETS = """
  error_count = j.error_count + 1,
  error = case when j.cancel_requested_at is null then :error end,
  run_after = clock_timestamp() + make_interval(secs => :backoff_s),
  state = case when j.cancel_requested_at is not null then 'cancelled'
               when not :retryable or j.error_count + 1 > j.max_errors then 'failed'
               when j.pause_requested_at is not null then 'paused'
               else 'queued' end
"""

_YIELD_SETS = """
  state = case when j.cancel_requested_at is not null then 'cancelled'
               when j.pause_requested_at is not null then 'paused'
               else 'queued' end
"""

_OWNED = "j.state in ('starting', 'running', 'finishing')"

_REAP = """
with dead as (
  select id from jobs
   where owner is not null and lease_until < clock_timestamp()
   order by lease_until limit :limit for update skip locked
)
update jobs j
   set owner = null, lease_until = null, lost_count = j.lost_count + 1,
       error = case when j.cancel_requested_at is null and j.pause_requested_at is null
                     and j.lost_count + 1 > j.max_lost then :error end,
       state = case when j.cancel_requested_at is not null then 'cancelled'
                    when j.pause_requested_at is not null then 'paused'
                    when j.lost_count + 1 > j.max_lost then 'failed'
                    else 'queued' end
  from dead where j.id = dead.id
returning j.id as job_id, j.public_id, j.attempt, j.state, j.worker, j.project_id,
          j.gpus * extract(epoch from j.heartbeat_at - j.started_at) as spent
"""

# Projects in the order of their ids: two reapers can then never wait for each other in a ring.
_CHARGE = """
with owed as (
  select * from unnest(cast(:projects as bigint[]), cast(:spent as double precision[]))
                  as owed (project_id, spent)
), locked as (
  select p.id from projects p where p.id in (select project_id from owed) order by p.id
  for no key update
)
update projects p
   set gpu_usage = p.gpu_usage * power(0.5, greatest(0, extract(epoch from
         clock_timestamp() - p.gpu_usage_at)) / :half_life)
         + (select sum(spent) from owed where owed.project_id = p.id),
       gpu_usage_at = clock_timestamp()
  from locked where p.id = locked.id
"""

_LOST = {
    "code": "worker_lost",
    "message": "the job's worker was lost again and again without one new step",
    "param": None,
    "category": "platform",
    "retriable": True,
    "hint": "look at the workers' logs; a data row or a batch size that kills the process is the "
    "usual reason",
}


async def claim_next(
    session: AsyncSession,
    *,
    queues: Sequence[str],
    gpus_free: int,
    worker: str,
    ttl_s: float,
    cached_models: Sequence[str] = (),
) -> Claim | None:
    """Take the best runnable job of `queues` that fits `gpus_free`; None when there is none.

    None is also the answer to a duplicate or late wake-up: return quietly.
    """
    statement = text(_CLAIM).bindparams(
        bindparam("queues", type_=ARRAY(Text)), bindparam("cached_models", type_=ARRAY(Text))
    )
    result = await session.execute(
        statement,
        {
            "queues": list(queues),
            "gpus_free": gpus_free,
            "cached_models": list(cached_models),
            "worker": worker,
            "owner": secrets.token_hex(16),
            "ttl_s": ttl_s,
            "half_life": HALF_LIFE_S,
            "head_start": HEAD_START_S,
        },
    )
    row = result.one_or_none()
    return None if row is None else Claim(**row._mapping)


async def holds(session: AsyncSession, claim: Claim) -> bool:
    """Whether the claim is alive; if so, it stays ours until this transaction ends.

    Locks the row: writes that follow in the same transaction are fenced by this one check.
    """
    statement = f"select 1 from jobs j where {_fence()} for no key update"
    return (await _one(session, statement, claim.fence)) is not None


async def beat(
    session: AsyncSession,
    claim: Claim,
    *,
    ttl_s: float,
    step: int = 0,
    progress: Progress | None = None,
) -> Orders | None:
    """Renew the lease, say how far the run is, learn what is asked; None: fenced.

    A step beyond every earlier one pays the loss budget back: a job that was preempted twenty
    times over three days is healthy, three losses without a step between them are not.
    """
    said = progress or Progress()
    statement = _typed(_BEAT.format(spent=_SPENT, fence=_fence()), "facts")
    values = claim.fence | {"ttl_s": ttl_s, "step": step} | _columns(said)
    row = await _one(session, statement, values)
    return None if row is None else Orders(row.cancel, row.pause, row.checkpoint)


async def move(session: AsyncSession, claim: Claim, from_state: str, to_state: str) -> bool:
    """starting -> running (first step done) or running -> finishing; False: fenced."""
    values = claim.fence | {"from_state": from_state, "to_state": to_state}
    return (await _one(session, _MOVE.format(fence=_fence()), values)) is not None


async def finish(
    session: AsyncSession,
    claim: Claim,
    *,
    final_checkpoint_id: int,
    fine_tuned_model: str | None,
    result_file_id: int | None,
    trained_tokens: int | None = None,
    peak_memory_bytes: int | None = None,
) -> bool:
    """Commit the result: the job has succeeded. False: fenced, or a cancel came first.

    After False, `yield_` tells which: it returns "cancelled", or None when fenced.
    """
    where = "j.state = 'finishing' and j.cancel_requested_at is null"
    values = {
        "final_checkpoint_id": final_checkpoint_id,
        "fine_tuned_model": fine_tuned_model,
        "result_file_id": result_file_id,
        "trained_tokens": trained_tokens,
        "peak_memory_bytes": peak_memory_bytes,
    }
    return await _end(session, claim, _FINISH_SETS, where, values) is not None


async def fail(
    session: AsyncSession,
    claim: Claim,
    *,
    error: Mapping[str, Any],
    retryable: bool,
    backoff_s: float = 0.0,
) -> str | None:
    """The run itself failed. Returns the job's new state; None: fenced.

    `error`: `{code, message, param, category, retriable, hint}`. A retryable error is retried
    after `backoff_s` until the error budget is used up; losses have a budget of their own.
    """
    values = {"error": dict(error), "retryable": retryable, "backoff_s": backoff_s}
    return await _end(session, claim, _FAIL_SETS, _OWNED, values)


async def yield_(session: AsyncSession, claim: Claim) -> str | None:
    """Give the job back: drain, pause or cancel. Nobody's fault, no budget used.

    Returns the job's new state: "queued", "paused" or "cancelled"; None: fenced.
    """
    return await _end(session, claim, _YIELD_SETS, _OWNED, {})


async def reap(session: AsyncSession, *, limit: int = 100) -> list[Reaped]:
    """End every attempt whose lease has lapsed. Any number of reapers may run at once."""
    statement = _typed(_REAP, "error")
    rows = (await session.execute(statement, {"limit": limit, "error": _LOST})).all()
    if rows:
        await session.execute(
            text(_CHARGE),
            {
                "projects": [row.project_id for row in rows],
                "spent": [float(row.spent or 0) for row in rows],
                "half_life": HALF_LIFE_S,
            },
        )
    return [Reaped(r.job_id, r.public_id, r.attempt, r.state, r.worker) for r in rows]


async def _end(
    session: AsyncSession, claim: Claim, sets: str, where: str, values: dict[str, Any]
) -> str | None:
    sql = _END.format(spent=_SPENT, sets=sets, fence=_fence(), where=where)
    row = await _one(
        session,
        _typed(sql, *(name for name in ("error",) if name in values)),
        claim.fence | values | {"half_life": HALF_LIFE_S},
    )
    return None if row is None else str(row.state)


async def _one(
    session: AsyncSession, statement: str | TextClause, values: Mapping[str, Any]
) -> Row[Any] | None:
    clause = text(statement) if isinstance(statement, str) else statement
    result: CursorResult[Any] = await session.execute(clause, values)  # type: ignore[assignment]
    return result.one_or_none()


def _typed(sql: str, *json_names: str) -> TextClause:
    """`sql` with some parameters passed as jsonb, where None means SQL's null."""
    return text(sql).bindparams(*(bindparam(n, type_=JSONB(none_as_null=True)) for n in json_names))


def _columns(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in Progress.__dataclass_fields__}
