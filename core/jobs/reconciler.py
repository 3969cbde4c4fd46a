"""Everything that time does: ring for waiting jobs, end lapsed leases, expire what is too old.

Any number of processes may run this. Each round of a duty happens under an advisory lock of its
transaction, so that one of them does it and the lock can never outlive its holder. A round that
fails for Postgres or the broker is tried again, later and later; it loses nothing, because what
it would have done is still written in the tables.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from core.db import claims, inspections, outbox, sweeps
from tunery.errors import TransientError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from core.db.engine import Database
    from core.settings import Settings

MAX_BACKOFF_S: Final = 10.0
RING_S: Final = 30.0
"""How long a job waits before its bell is rung again: a broker that lost everything heals."""
EXPIRE_S: Final = 60.0
_BATCH: Final = 100

log = structlog.get_logger(__name__)


class Bell(Protocol):
    """What is needed of `core.broker.Broker`."""

    def wake(self, queue: str) -> None: ...
    def waiting(self, queue: str) -> int: ...


@dataclass(frozen=True)
class Duty:
    """Something to be done every so often."""

    name: str
    every_s: float
    work: Callable[[], Awaitable[None]]
    prompt: asyncio.Event | None = None
    """Set by whoever cannot wait for the next round."""


async def run(
    db: Database,
    broker: Bell,
    settings: Settings,
    stop: asyncio.Event,
    poke: asyncio.Event,
    *,
    ring_s: float = RING_S,
    expire_s: float = EXPIRE_S,
) -> None:
    """Reconcile until `stop` is set. Set `poke` after a submit: its wake-up goes out at once."""
    duties = (
        Duty("relay", settings.relay_s, lambda: relay(db, broker), poke),
        Duty("reap", settings.reap_s, lambda: reap(db, poke)),
        Duty("ring", ring_s, lambda: ring(db, broker, ring_s)),
        Duty("expire", expire_s, lambda: expire(db)),
    )
    async with asyncio.TaskGroup() as tasks:
        for duty in duties:
            tasks.create_task(_repeat(duty, stop), name=f"reconciler.{duty.name}")


async def relay(db: Database, broker: Bell) -> None:
    """Publish every wake-up that is due.

    Raises:
        TransientError: Postgres or the broker is away; what was not published is still owed.
    """

    async def publish(queue: str) -> None:
        await asyncio.to_thread(broker.wake, queue)

    while True:
        async with db.begin() as session:
            if not await sweeps.on_duty(session, 1):
                return
            published = await outbox.relay(session, publish, limit=_BATCH)
        if published:
            _tell(log.info, "outbox.relayed", messages=published)
        if published < _BATCH:
            return


async def reap(db: Database, poke: asyncio.Event) -> None:
    """End the attempts of workers that fell silent; the relay then rings for the job."""
    while True:
        async with db.begin() as session:
            if not await sweeps.on_duty(session, 2):
                return
            reaped = await claims.reap(session, limit=_BATCH)
        for job in reaped:
            _tell(
                log.warning,
                "lease.lapsed",
                job=job.public_id,
                attempt=job.attempt,
                worker=job.worker,
                state=job.state,
            )
        if reaped:
            poke.set()
        if len(reaped) < _BATCH:
            return


async def ring(db: Database, broker: Bell, older_than_s: float) -> None:
    """Ring again for queues whose jobs still wait, unless their bell is ringing already.

    Raises:
        TransientError: Postgres or the broker is away.
    """
    async with db.begin() as session:
        if not await sweeps.on_duty(session, 3):
            return
        quiet = await outbox.quiet_queues(session, older_than_s=older_than_s)
    for queue, wanted in quiet.items():
        missing = wanted - await asyncio.to_thread(broker.waiting, queue)
        for _ in range(missing):
            await asyncio.to_thread(broker.wake, queue)
        if missing > 0:
            _tell(log.info, "queue.rung_again", queue=queue, messages=missing)


async def expire(db: Database) -> None:
    """Close stale uploads; forget old idempotency keys and questions."""
    async with db.begin() as session:
        if not await sweeps.on_duty(session, 4):
            return
        uploads = await sweeps.expire_uploads(session)
        keys = await sweeps.expire_idempotency_keys(session)
        await inspections.forget(session)
    if uploads or keys:
        _tell(log.info, "expired", uploads=len(uploads), idempotency_keys=keys)


async def _repeat(duty: Duty, stop: asyncio.Event) -> None:
    failures = 0
    while not stop.is_set():
        if duty.prompt is not None:
            duty.prompt.clear()
        try:
            await duty.work()
            if failures:
                _tell(log.info, "duty.recovered", duty=duty.name, failures=failures)
            failures = 0
        except TransientError as error:
            failures += 1
            _tell(log.warning, "duty.failed", duty=duty.name, failures=failures, error=str(error))
        except Exception:
            # The edge of a task that must outlive what nobody foresaw: the other duties, and
            # the next round of this one, are needed all the same.
            failures += 1
            _tell(log.exception, "duty.broke", duty=duty.name, failures=failures)
        pause_s = min(MAX_BACKOFF_S, duty.every_s * 2 ** min(failures, 10))
        await _wait(pause_s if failures else duty.every_s, stop, None if failures else duty.prompt)


def _tell(say: Callable[..., object], event: str, **values: object) -> None:
    """Log, or fail to: a full disk behind standard output must not end the duties."""
    with contextlib.suppress(Exception):
        say(event, **values)


async def _wait(seconds: float, *events: asyncio.Event | None) -> None:
    """Until any of the events is set, at most for `seconds`."""
    waits = [asyncio.ensure_future(event.wait()) for event in events if event is not None]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
