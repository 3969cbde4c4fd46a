"""Who is there."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from core.db import workers


async def register(site, name="w", **options):
    return await site.does(
        workers.upsert,
        **{
            "name": name,
            "host": "h",
            "pid": 1,
            "queues": ["default"],
            "devices": [{"index": 0}],
            "versions": {"tunery": "0"},
            "cached_models": [],
            **options,
        },
    )


async def test_a_worker_is_idle_then_busy_then_draining(site):
    row = await register(site)
    view = await site.does(workers.get, row.public_id)
    assert (view.status, view.jobs) == ("idle", ())
    jobs = [(await site.submit()).public_id for _ in range(2)]
    for _ in jobs:
        await site.claimed(worker="w")
    view = await site.does(workers.get, row.public_id)
    assert (view.status, view.jobs) == ("busy", tuple(jobs))
    assert await site.does(workers.drain, row.public_id)
    assert (await site.does(workers.get, row.public_id)).status == "draining"
    assert await site.does(workers.undrain, row.public_id)
    assert (await site.does(workers.get, row.public_id)).status == "busy"


async def test_a_silent_worker_is_lost(site):
    row = await register(site)
    async with site.db.begin() as s:
        await s.execute(text("update workers set heartbeat_at = now() - interval '10 min'"))
    view = await site.does(workers.get, row.public_id)
    assert view.status == "lost"
    assert view.silent_s == pytest.approx(600, abs=60)
    await site.does(workers.heartbeat, "w")
    assert (await site.does(workers.get, row.public_id)).status == "idle"


async def test_a_heartbeat_tells_of_a_drain(site):
    row = await register(site)
    assert await site.does(workers.heartbeat, "w", cached_models=["m"]) is False
    await site.does(workers.drain, row.public_id)
    assert await site.does(workers.heartbeat, "w") is True
    assert await site.does(workers.heartbeat, "stranger") is None
    assert (await site.does(workers.get, row.public_id)).row.cached_models == ["m"]


async def test_registering_again_is_the_same_worker_ready_for_work(site):
    row = await register(site)
    await site.does(workers.drain, row.public_id)
    again = await register(site, pid=2)
    assert again.public_id == row.public_id
    view = await site.does(workers.get, row.public_id)
    assert (view.status, view.row.pid) == ("idle", 2)


async def test_workers_are_listed_by_name_until_they_leave(site):
    for name in ("b", "a"):
        await register(site, name)
    assert [view.row.name for view in await site.does(workers.list_workers)] == ["a", "b"]
    await site.does(workers.remove, "a")
    assert [view.row.name for view in await site.does(workers.list_workers)] == ["b"]
    assert await site.does(workers.get, "wk_none") is None
    assert not await site.does(workers.drain, "wk_none")
