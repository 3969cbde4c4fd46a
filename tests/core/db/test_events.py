"""A job's history: no hole, no duplicate, the order of commits."""

from __future__ import annotations

import asyncio

from core.db import events


async def append(site, job, **options):
    return await site.does(events.append, job.id, **{"kind": "k", "message": "m", **options})


async def test_writers_at_the_same_time_leave_no_hole(site):
    job = await site.submit()
    await asyncio.gather(*(append(site, job, message=str(n)) for n in range(30)))
    rows = await site.does(events.events_after, job.id, 0)
    assert [row.seq for row in rows] == list(range(1, 32))
    assert {row.message for row in rows[1:]} == {str(n) for n in range(30)}
    assert await site.does(events.count, job.id) == 31


async def test_a_reader_that_follows_never_misses_an_event(site):
    """With ids from a sequence, a slow writer's lower id would appear behind the reader."""
    job = await site.submit()
    reading, seen = True, []

    async def follow():
        seq = 0
        while reading or len(seen) < 21:
            for row in await site.does(events.events_after, job.id, seq):
                seen.append(row.seq)
                seq = row.seq
            await asyncio.sleep(0.002)

    async def slow(n):
        async with site.db.begin() as s:
            await asyncio.sleep(0.001 * (n % 3))
            await events.append(s, job.id, kind="k", message=str(n))
            await asyncio.sleep(0.002 * (n % 5))

    reader = asyncio.create_task(follow())
    await asyncio.gather(*(slow(n) for n in range(20)))
    reading = False
    await asyncio.wait_for(reader, 10)
    assert seen == list(range(1, 22))


async def test_an_older_attempt_has_nothing_more_to_say(site):
    job = await site.submit()
    await site.claimed()
    assert await append(site, job, attempt=0) is None
    assert (await append(site, job, attempt=1)).attempt == 1
    assert (await append(site, job)).attempt == 1


async def test_pages_filters_and_a_foreign_cursor(site):
    job, stranger = await site.submit(), await site.submit()
    for n in range(5):
        await append(site, job, message=str(n), type="metrics" if n % 2 else "message")
    foreign = await append(site, stranger)
    page, more = await site.does(events.list_events, job.id, limit=2)
    assert ([row.message for row in page], more) == (["4", "3"], True)
    page, more = await site.does(events.list_events, job.id, limit=9, after=page[-1].public_id)
    assert ([row.seq for row in page], more) == ([4, 3, 2, 1], False)
    page, _ = await site.does(events.list_events, job.id, order="asc", type="metrics")
    assert [row.message for row in page] == ["1", "3"]
    page, _ = await site.does(events.list_events, job.id, kinds=["status"])
    assert [row.seq for row in page] == [1]
    page, _ = await site.does(events.list_events, job.id, level="error")
    assert page == []
    assert await site.does(events.list_events, job.id, after=foreign.public_id) is None
