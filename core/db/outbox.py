"""Wake-ups owed to workers: written with the job, published by the relay, and never truth.

A crash between publishing and committing publishes twice, which the claim makes harmless; a
broker that lost everything is healed by `quiet_queues`, which looks at the jobs themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession

_TAKE = text("""
delete from outbox where id in (
  select id from outbox where not_before <= clock_timestamp()
   order by id limit :limit for update skip locked
) returning id, queue
""")

_WAITING = text("""
select j.queue, count(*) as jobs,
       (select count(*) from workers w
         where j.queue = any(w.queues) and w.drain_requested_at is null
           and w.heartbeat_at > clock_timestamp() - make_interval(secs => :live_s)) as workers
  from jobs j
 where j.state = 'queued' and not j.hold
   and j.run_after < clock_timestamp() - make_interval(secs => :older_than_s)
 group by j.queue order by j.queue
""")


async def relay(
    session: AsyncSession, publish: Callable[[str], Awaitable[None]], *, limit: int = 100
) -> int:
    """Publish what is due, in order; the caller commits afterwards. Returns how many there were.

    Raises what `publish` raises, at the first failure: roll back, nothing is lost.
    """
    taken = (await session.execute(_TAKE, {"limit": limit})).all()
    for row in sorted(taken):
        await publish(row.queue)
    return len(taken)


async def quiet_queues(
    session: AsyncSession, *, older_than_s: float = 30.0, live_s: float = 120.0
) -> dict[str, int]:
    """Queues whose jobs have waited for long, and how many wake-ups each can use.

    No more than there are live workers to wake (at least one, for a worker that has yet to
    register): a queue of a thousand jobs behind one busy worker needs one bell, not a thousand.
    """
    rows = await session.execute(_WAITING, {"older_than_s": older_than_s, "live_s": live_s})
    return {row.queue: min(row.jobs, max(1, row.workers)) for row in rows}
