"""The proof: hundreds of jobs, eight workers that stall, crash, err and yield, a canceller and a
pauser; afterwards the history is read and nothing in it is wrong.

Leases are so short that they lapse all the time. A worker that stalls past its lease wakes as a
zombie and goes on writing; all of that has to be refused.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from sqlalchemy import text

from core.db import checkpoints, claims
from core.db.jobs import JobRepository
from tunery.errors import Conflict

JOBS = 200
WORKERS = 8
TTL_S = 0.08
STALL_S = 0.12
BUDGET_S = 60.0  # far beyond what it takes; ends a hang
ERROR = {"code": "cuda_error", "message": "again"}
STEPS = 3


@dataclass
class Tally:
    """What the workers saw from their side."""

    refused: Counter[str] = field(default_factory=Counter)
    commits: list[tuple[int, int]] = field(default_factory=list)
    claims: list[tuple[int, int]] = field(default_factory=list)
    cancels: set[str] = field(default_factory=set)
    reaps: int = 0


@dataclass
class Worker:
    """Claims and runs jobs, badly."""

    site: object
    tally: Tally
    name: str
    draw: random.Random
    done: asyncio.Event

    async def live(self):
        while not self.done.is_set():
            claim = await self.site.claim(ttl_s=TTL_S, worker=self.name)
            if claim is None:
                await asyncio.sleep(0.01)
                continue
            self.tally.claims.append((claim.job_id, claim.attempt))
            await self.run(claim)

    async def run(self, claim):
        if not await self.write("move", claims.move, claim, "starting", "running"):
            return
        for step in range(1, STEPS + 1):
            luck = self.draw.random()
            if luck < 0.10:
                await asyncio.sleep(STALL_S)  # then go on as if nothing had happened
            elif luck < 0.13:
                return  # crashed: not a word to anybody
            elif luck < 0.16:
                await self.write("fail", claims.fail, claim, error=ERROR, retryable=True)
                return
            elif luck < 0.20:
                await self.write("yield", claims.yield_, claim)
                return
            orders = await self.write("beat", claims.beat, claim, ttl_s=TTL_S, step=step)
            if orders is None and self.draw.random() < 0.5:
                return  # fenced, and obeys; the other half goes on writing
            if orders is not None and (orders.cancel or orders.pause):
                await self.write("yield", claims.yield_, claim)
                return
        await self.publish(claim)

    async def publish(self, claim):
        await self.write("move", claims.move, claim, "running", "finishing")
        if self.draw.random() < 0.1:
            await asyncio.sleep(STALL_S)
        async with self.site.db.begin() as session:
            row = await checkpoints.insert(
                session,
                claim,
                step=STEPS,
                kinds=["export"],
                prefix=f"{claim.public_id}/{claim.attempt}",
                manifest=[],
                size_bytes=0,
                metrics={},
                name=f"{claim.public_id}:{claim.attempt}",
            )
        if row is None:
            self.tally.refused["checkpoint"] += 1
            return
        if await self.write(
            "finish",
            claims.finish,
            claim,
            final_checkpoint_id=row.id,
            fine_tuned_model=f"by-{claim.attempt}-{claim.owner}",
            result_file_id=None,
        ):
            self.tally.commits.append((claim.job_id, claim.attempt))
        else:
            await self.write("yield", claims.yield_, claim)

    async def write(self, name, act, *arguments, **options):
        result = await self.site.does(act, *arguments, **options)
        if not result:
            self.tally.refused[name] += 1
        return result


async def meddle(site, tally, ids, draw, done):
    """A canceller and a pauser in one: the wishes of impatient users."""
    while not done.is_set():
        await asyncio.sleep(0.01)
        public_id = draw.choice(ids)
        wish = draw.choice(["cancel", "pause", "pause", "resume", "resume"])
        if wish == "cancel" and draw.random() < 0.7:
            continue
        try:
            await site.may(wish, public_id)
        except Conflict:
            continue
        if wish == "cancel":
            tally.cancels.add(public_id)


async def reap(site, tally, done):
    while not done.is_set():
        tally.reaps += len(await site.does(claims.reap))
        await asyncio.sleep(0.02)


async def settle(site, done):
    """Wait until every job has ended; wake the paused so that they can."""
    deadline = time.monotonic() + BUDGET_S
    while time.monotonic() < deadline:
        async with site.db.session() as session:
            rows = await session.execute(
                text("select public_id, state from jobs where finished_at is null")
            )
            waiting = [tuple(row) for row in rows]
        if not waiting:
            done.set()
            return
        if len(waiting) < 40:
            for public_id, state in waiting:
                if state == "paused":
                    await site.may("resume", public_id)
        await asyncio.sleep(0.1)
    done.set()
    pytest.fail(f"{len(waiting)} jobs never ended, for instance {waiting[:5]}")


async def play(site, tally, seed=0):
    async with site.db.begin() as session:
        repository = JobRepository(session, site.project_id)
        ids = [
            (
                await repository.insert(
                    model="tiny",
                    method="supervised",
                    seed=n,
                    training_file_id=site.file_id,
                    request={},
                    spec={},
                    resolved={},
                    max_errors=2,
                    max_lost=2,
                )
            ).public_id
            for n in range(JOBS)
        ]
    done = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(WORKERS):
            draw = random.Random(f"{seed}/{number}")
            group.create_task(Worker(site, tally, f"w{number}", draw, done).live())
        group.create_task(meddle(site, tally, ids, random.Random(f"{seed}/meddler"), done))
        group.create_task(reap(site, tally, done))
        group.create_task(settle(site, done))


async def history(site):
    """(seq, attempt, from, to) of every move, per job."""
    async with site.db.session() as session:
        rows = await session.execute(
            text(
                "select job_id, seq, attempt, from_state, to_state from job_events"
                " order by job_id, seq"
            )
        )
        found = defaultdict(list)
        for job_id, *event in rows:
            found[job_id].append(tuple(event))
        return found


@pytest.mark.slow
async def test_nothing_is_run_twice_committed_twice_or_lost(site):
    tally = Tally()
    await play(site, tally)

    # It was a real mess, or the rest proves nothing.
    assert tally.reaps > 20
    assert sum(tally.refused.values()) > 20
    assert tally.cancels

    # No double owner: a claim's attempt number is issued once.
    assert len(tally.claims) == len(set(tally.claims))

    async with site.db.session() as session:
        rows = (
            await session.execute(
                text(
                    "select id, public_id, state, attempt, owner, fine_tuned_model, last_event_seq,"
                    " cancel_requested_at is not null from jobs order by id"
                )
            )
        ).all()
    assert len(rows) == JOBS
    assert {row.state for row in rows} <= {"succeeded", "failed", "cancelled"}
    assert all(row.owner is None for row in rows)

    # No double commit: as many as succeeded rows, one each, by the attempt that the row names.
    succeeded = {row.id: row for row in rows if row.state == "succeeded"}
    assert sorted(job for job, _ in tally.commits) == sorted(succeeded)
    for job_id, attempt in tally.commits:
        assert succeeded[job_id].attempt == attempt
        assert succeeded[job_id].fine_tuned_model.startswith(f"by-{attempt}-")

    # Cancelled and succeeded exclude each other: a success was never asked to stop.
    assert not any(row[-1] for row in succeeded.values())

    # No broken chain: no hole, each move starts where the last one ended, attempts grow by claims.
    stories = await history(site)
    for row in rows:
        events = stories[row.id]
        assert [event[0] for event in events] == list(range(1, row.last_event_seq + 1))
        moves = [event for event in events if event[3] is not None]
        state, attempt = None, 0
        for _, at_attempt, source, target in moves:
            assert source == state
            attempt += target == "starting"
            assert at_attempt == attempt
            state = target
        assert (state, attempt) == (row.state, row.attempt)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["attempt", "lease"])
async def test_a_worker_without_its_fence_would_be_noticed(site, monkeypatch, term):
    """The proof can fail: with the owner's and one more check gone, zombies get through."""
    monkeypatch.delitem(claims.FENCE, "owner")
    monkeypatch.delitem(claims.FENCE, term)
    await site.submit()
    zombie = await site.claimed(ttl_s=TTL_S)
    await asyncio.sleep(TTL_S)
    if term == "attempt":
        await site.does(claims.reap)
        await site.claimed()
    assert await site.does(claims.beat, zombie, ttl_s=TTL_S) is not None
