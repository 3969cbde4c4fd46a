"""A trainer's output."""

from __future__ import annotations

from core.db import claims, logs


async def test_chunks_are_numbered_and_read_from_either_end(site):
    job = await site.submit()
    for word in ("one", "two", "three"):
        await site.does(logs.append, job.id, 0, word)
    assert [c.text for c in await site.does(logs.tail, job.id, 2)] == ["two", "three"]
    assert [c.seq for c in await site.does(logs.after, job.id, 1)] == [2, 3]
    assert await site.does(logs.after, job.id, 3) == []


async def test_an_older_attempt_adds_nothing(site):
    job = await site.submit()
    first = await site.claimed()
    assert await site.does(logs.append, job.id, 1, "first") == 1
    await site.does(claims.yield_, first)
    await site.claimed()
    assert await site.does(logs.append, job.id, 1, "ghost") is None
    assert await site.does(logs.append, job.id, 2, "second") == 2
    assert [c.text for c in await site.does(logs.tail, job.id, attempt=1)] == ["first"]
    assert [c.text for c in await site.does(logs.after, job.id, attempt=2)] == ["second"]


async def test_a_flood_loses_its_own_past_only(site, monkeypatch):
    monkeypatch.setattr(logs, "KEPT_CHUNKS", 3)
    monkeypatch.setattr(logs, "CHUNK_CHARS", 4)
    job, neighbour = await site.submit(), await site.submit()
    await site.does(logs.append, neighbour.id, 0, "kept")
    assert await site.does(logs.append, job.id, 0, "aaaabbbbccccddddee") == 5
    assert [c.text for c in await site.does(logs.tail, job.id)] == ["cccc", "dddd", "ee"]
    assert [c.text for c in await site.does(logs.tail, neighbour.id)] == ["kept"]


async def test_what_postgres_cannot_store_is_replaced(site):
    job = await site.submit()
    await site.does(logs.append, job.id, 0, "a\x00b")
    assert [c.text for c in await site.does(logs.tail, job.id)] == ["a\ufffdb"]
