"""The reconciler against a real Postgres, and a broker that can be away."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time

import pytest
from sqlalchemy import text

from core.broker import Broker
from core.db import claims, sweeps
from core.jobs import reconciler
from tunery.errors import ServiceUnavailable


class Bell:
    """A doorbell that counts, and can be out of order."""

    def __init__(self):
        self.rung, self.broken, self.unread, self.refused = [], False, 0, 0

    def wake(self, queue):
        if self.broken:
            self.refused += 1
            raise ServiceUnavailable("no answer")
        self.rung.append(queue)

    def waiting(self, queue):
        if self.broken:
            raise ServiceUnavailable("no answer")
        return self.unread


@contextlib.asynccontextmanager
async def running(db, bell, settings, **options):
    stop, poke = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(reconciler.run(db, bell, settings, stop, poke, **options))
    try:
        yield poke
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def until(condition, patience_s=20.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


async def test_a_submit_rings_at_once_when_poked(site, settings):
    bell = Bell()
    patient = settings.model_copy(update={"relay_s": 3600.0})
    async with running(site.db, bell, patient) as poke:
        await asyncio.sleep(0.2)
        await site.submit(queue="gpu.8")
        await asyncio.sleep(0.2)
        assert bell.rung == []
        poke.set()
        await until(lambda: bell.rung == ["gpu.8"])


async def test_a_submit_rings_soon_without_a_poke(site, settings):
    bell = Bell()
    async with running(site.db, bell, settings):
        await site.submit()
        await until(lambda: bell.rung == ["default"])


async def test_a_lapsed_lease_goes_back_to_the_queue_and_rings(site, settings):
    bell = Bell()
    job = await site.submit()
    claim = await site.claimed()
    async with site.db.begin() as s:
        await s.execute(text("delete from outbox"))
    async with running(site.db, bell, settings):
        await site.lapse(claim)
        await until(lambda: bell.rung == ["default"])
    assert (await site.get(job.public_id)).state == "queued"


async def test_a_broker_outage_delays_and_loses_nothing(site, settings):
    bell = Bell()
    bell.broken = True
    async with running(site.db, bell, settings):
        for _ in range(3):
            await site.submit()
        claim = await site.claimed()
        await site.lapse(claim)  # what does not need the broker goes on without it
        for _ in range(100):
            if (await site.get(claim.public_id)).state == "queued":
                break
            await asyncio.sleep(0.1)
        assert (await site.get(claim.public_id)).state == "queued"
        assert bell.rung == []
        bell.broken = False
        await until(lambda: len(bell.rung) == 4)


async def test_a_database_outage_is_survived(site, settings, database_url, monkeypatch):
    bell = Bell()
    away = False
    begin = site.db.begin

    def maybe():
        if away:
            raise ServiceUnavailable("the database does not answer")
        return begin()

    async with running(site.db, bell, settings):
        monkeypatch.setattr(site.db, "begin", maybe)
        away = True
        await asyncio.sleep(0.5)
        away = False
        await site.submit()
        await until(lambda: bell.rung == ["default"])


async def test_terminated_connections_are_survived(site, settings, administer):
    bell = Bell()
    async with running(site.db, bell, settings):
        for n in range(5):
            administer.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname like 'test_%' and pid <> pg_backend_pid()"
            )
            with contextlib.suppress(ServiceUnavailable):
                await site.submit()
            await asyncio.sleep(0.05 * n)
        bell.rung.clear()
        await site.submit()
        await until(lambda: len(bell.rung) >= 1)


async def test_a_bug_in_one_duty_does_not_stop_the_others(site, settings, monkeypatch):
    async def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(reconciler, "reap", broken)
    bell = Bell()
    async with running(site.db, bell, settings):
        await site.submit()
        await until(lambda: bell.rung == ["default"])


async def test_a_wiped_broker_heals(site, settings):
    bell = Bell()
    await site.submit()
    async with site.db.begin() as s:
        await s.execute(text("delete from outbox"))
    async with running(site.db, bell, settings, ring_s=0.2):
        await until(lambda: bell.rung[:1] == ["default"])


async def test_a_log_that_cannot_be_written_ends_no_duty(site, settings, monkeypatch):
    class Full:
        def __getattr__(self, level):
            def say(*_, **__):
                raise OSError(errno.ENOSPC, "no space left on device")

            return say

    monkeypatch.setattr(reconciler, "log", Full())
    bell = Bell()
    bell.broken = True
    async with running(site.db, bell, settings.model_copy(update={"relay_s": 0.05})):
        await site.submit()
        await until(lambda: bell.refused > 1)  # each a failure that is logged, or should be
        bell.broken = False
        await until(lambda: bell.rung == ["default"])


async def test_a_bell_that_rings_already_is_left_alone(site):
    bell = Bell()
    bell.unread = 1
    await site.submit()
    await reconciler.ring(site.db, bell, 0.0)
    assert bell.rung == []
    bell.unread = 0
    await reconciler.ring(site.db, bell, 0.0)
    assert bell.rung == ["default"]


async def test_of_two_processes_one_does_each_duty(site):
    bell = Bell()
    await site.submit()
    async with site.db.begin() as s:
        assert await sweeps.on_duty(s, 1)
        await reconciler.relay(site.db, bell)
        assert bell.rung == []
    await reconciler.relay(site.db, bell)
    assert bell.rung == ["default"]


async def test_more_wake_ups_than_one_batch_go_out_in_one_round(site):
    bell = Bell()
    async with site.db.begin() as s:
        await s.execute(text("insert into outbox (queue) select 'q' from generate_series(1, 250)"))
    await reconciler.relay(site.db, bell)
    assert len(bell.rung) == 250


async def test_stale_uploads_and_old_keys_expire(site):
    async with site.db.begin() as s:
        await s.execute(
            text(
                "insert into uploads (public_id, project_id, filename, purpose, mime_type,"
                " size_bytes, status, expires_at)"
                " select v.id, :p, 'f', 'fine-tune', 't', 1, v.status, now() + v.after"
                " from (values ('stale', 'pending', interval '-1 s'),"
                " ('fresh', 'pending', interval '1 h'), ('done', 'completed', interval '-1 s'))"
                " as v (id, status, after)"
            ),
            {"p": site.project_id},
        )
        await s.execute(
            text(
                "insert into idempotency_keys (project_id, route, key, body_sha256, created_at)"
                " values (:p, 'r', 'old', '', now() - interval '25 h'), (:p, 'r', 'new', '', now())"
            ),
            {"p": site.project_id},
        )
    await reconciler.expire(site.db)
    async with site.db.session() as s:
        uploads = dict((await s.execute(text("select public_id, status from uploads"))).all())
        keys = list(await s.scalars(text("select key from idempotency_keys")))
    assert uploads == {"stale": "expired", "fresh": "pending", "done": "completed"}
    assert keys == ["new"]


async def test_messages_reach_a_real_broker(site, broker_url):
    broker = Broker(broker_url)
    await site.submit()
    await reconciler.relay(site.db, broker)
    assert broker.waiting("default") == 1
    claim = await site.claimed()
    assert await site.does(claims.yield_, claim) == "queued"
    await reconciler.ring(site.db, broker, 0.0)
    assert broker.waiting("default") == 1
    broker.close()


@pytest.mark.parametrize("events", [0, 1])
async def test_waiting_ends_with_an_event_or_the_clock(events):
    event = asyncio.Event()
    if events:
        event.set()
    started = time.monotonic()
    await reconciler._wait(60.0 if events else 0.05, event, None)
    assert time.monotonic() - started < 30
