"""The relay may crash anywhere: wake-ups are doubled at worst, never lost."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from core.db import outbox, workers
from tunery.errors import ServiceUnavailable


async def owed(site):
    async with site.db.session() as s:
        return await s.scalar(text("select count(*) from outbox"))


class Bell:
    """Counts, and fails from the `limit`-th message on."""

    def __init__(self, limit=1000):
        self.rung, self.limit = [], limit

    async def __call__(self, queue):
        if len(self.rung) >= self.limit:
            raise ServiceUnavailable("frozen")
        self.rung.append(queue)


async def test_every_wake_up_is_published_once_and_in_order(site):
    for queue in ("a", "b", "a"):
        await site.submit(queue=queue)
    bell = Bell()
    assert await site.does(outbox.relay, bell) == 3
    assert bell.rung == ["a", "b", "a"]
    assert await site.does(outbox.relay, bell) == 0


async def test_a_failing_broker_loses_nothing(site):
    for _ in range(3):
        await site.submit()
    bell = Bell(limit=1)
    with pytest.raises(ServiceUnavailable):
        await site.does(outbox.relay, bell)
    assert await owed(site) == 3
    assert await site.does(outbox.relay, Bell()) == 3


async def test_a_crash_after_publishing_publishes_again(site):
    await site.submit()
    bell = Bell()
    async with site.db.session() as s:
        await outbox.relay(s, bell)
        await s.rollback()  # the process died before its commit
    assert await site.does(outbox.relay, bell) == 1
    assert bell.rung == ["default", "default"]


async def test_a_submit_that_is_rolled_back_owes_nothing(site):
    from core.db.jobs import JobRepository

    columns = {"model": "m", "method": "supervised", "seed": 1, "request": {}, "spec": {}}
    async with site.db.session() as s:
        await JobRepository(s, site.project_id).insert(
            **columns, resolved={}, training_file_id=site.file_id
        )
        await s.rollback()
    assert await owed(site) == 0


async def test_two_relays_do_not_wait_for_each_other_nor_publish_twice(site):
    for _ in range(40):
        await site.submit()
    bell = Bell()

    async def slow(queue):
        await bell(queue)
        await asyncio.sleep(0.001)

    counts = await asyncio.gather(*(site.does(outbox.relay, slow, limit=10) for _ in range(4)))
    assert counts == [10, 10, 10, 10]
    assert len(bell.rung) == 40


async def test_a_wake_up_waits_for_its_time(site):
    await site.submit()
    async with site.db.begin() as s:
        await s.execute(text("update outbox set not_before = now() + interval '1 hour'"))
    assert await site.does(outbox.relay, Bell()) == 0
    assert await owed(site) == 1


async def test_queues_that_wait_for_long_are_named_with_as_many_bells_as_help(site):
    for _ in range(5):
        await site.submit(queue="busy")
    await site.submit(queue="alone")
    await site.submit(queue="held", hold=True)
    assert await site.does(outbox.quiet_queues, older_than_s=30.0) == {}
    for name in ("w1", "w2"):
        await site.does(
            workers.upsert,
            name=name,
            host="h",
            pid=1,
            queues=["busy"],
            devices=[],
            versions={},
            cached_models=[],
        )
    found = await site.does(outbox.quiet_queues, older_than_s=0.0)
    assert found == {"alone": 1, "busy": 2}
