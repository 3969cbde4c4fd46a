"""Random sequences of everything that can happen to jobs, against a model in plain Python.

The model knows what each step must do to each row; after every step the rows are compared with it
and the history is read. Tokens of every claim ever made are kept and used again, so most writers
are zombies.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from core.db import claims, outbox
from core.db.engine import Database
from core.db.jobs import JobRepository
from tests.core.conftest import make_site
from tunery.errors import Conflict

EXAMPLES = int(os.environ.get("TUNERY_MACHINE_EXAMPLES", "25"))
ENDS = {"succeeded", "failed", "cancelled"}
HELD = {"starting", "running", "finishing"}
ERROR = {"code": "x", "message": "m"}


@dataclass
class Model:
    """One job as it has to be."""

    public_id: str
    max_errors: int
    max_lost: int
    hold: bool
    state: str = "queued"
    attempt: int = 0
    errors: int = 0
    lost: int = 0
    step: int = 0
    cancel: bool = False
    pause: bool = False
    lapsed: bool = False
    owner: str | None = None
    moves: list = field(default_factory=lambda: ["queued"])

    def to(self, state):
        self.state = state
        self.moves.append(state)
        if state not in HELD:
            self.owner, self.lapsed = None, False
        if state == "paused":
            self.pause = False

    def accepts(self, claim):
        return (claim.attempt, claim.owner) == (self.attempt, self.owner) and not self.lapsed

    def wish(self, otherwise):
        return "cancelled" if self.cancel else "paused" if self.pause else otherwise

    @property
    def runnable(self):
        return self.state == "queued" and not self.hold


class Machine(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    tokens = Bundle("tokens")

    def __init__(self, url):
        super().__init__()
        self.url = url
        self.runner = asyncio.Runner()
        self.model = {}
        self.owed = 0

    # Two jobs from the start, no claims in vain: else most random steps
    # would find nothing to do.
    @initialize(target=jobs)
    def begin(self):
        async def prepare():
            self.db = Database(self.url, pool_size=1)
            async with self.db.begin() as session:
                await session.execute(text("truncate projects restart identity cascade"))
                await session.execute(text("truncate outbox"))
            return await make_site(self.db)

        self.site = self.runner.run(prepare())
        return multiple(self.submit(False, 1, 1), self.submit(False, 0, 2))

    def teardown(self):
        if hasattr(self, "db"):
            self.runner.run(self.db.close())
        self.runner.close()

    def do(self, act, *arguments, **options):
        return self.runner.run(self.site.does(act, *arguments, **options))

    def to(self, job, state):
        job.to(state)
        if state == "queued" and not job.hold:
            self.owed += 1

    # Few jobs and mostly claimable ones: what matters happens to one row many times over.
    @precondition(lambda self: len(self.model) < 3)
    @rule(
        target=jobs,
        hold=st.sampled_from([False, False, False, True]),
        max_errors=st.integers(0, 2),
        max_lost=st.integers(0, 2),
    )
    def submit(self, hold, max_errors, max_lost):
        row = self.runner.run(self.site.submit(hold=hold, max_errors=max_errors, max_lost=max_lost))
        self.model[row.id] = Model(row.public_id, max_errors, max_lost, hold)
        self.owed += not hold
        return row.id

    @precondition(lambda self: any(job.runnable for job in self.model.values()))
    @rule(target=tokens)
    def claim(self):
        claim = self.runner.run(self.site.claim())
        runnable = [key for key, job in self.model.items() if job.runnable]
        if claim is None:
            assert not runnable
            return multiple()
        assert claim.job_id in runnable
        job = self.model[claim.job_id]
        job.attempt += 1
        assert claim.attempt == job.attempt
        job.owner = claim.owner
        job.to("starting")
        return claim

    @rule(token=tokens, step=st.integers(0, 5))
    def beat(self, token, step):
        job = self.model[token.job_id]
        orders = self.do(claims.beat, token, ttl_s=60.0, step=step)
        assert (orders is not None) == job.accepts(token)
        if orders is not None:
            assert (orders.cancel, orders.pause) == (job.cancel, job.pause)
            if step > job.step:
                job.step, job.lost = step, 0

    @rule(token=tokens, move=st.sampled_from([("starting", "running"), ("running", "finishing")]))
    def move(self, token, move):
        job = self.model[token.job_id]
        expected = job.accepts(token) and job.state == move[0]
        assert self.do(claims.move, token, *move) == expected
        if expected:
            job.to(move[1])

    @rule(token=tokens, trained=st.booleans(), cancelled_between=st.booleans())
    def publish_and_finish(self, token, trained, cancelled_between):
        job = self.model[token.job_id]
        if trained:
            self.move(token, ("starting", "running"))
            self.move(token, ("running", "finishing"))
        row = self.runner.run(self.site.checkpoint(token, kinds=["export"]))
        assert (row is not None) == job.accepts(token)
        if row is None:
            return
        if cancelled_between:
            self.cancel(token.job_id)
        expected = job.accepts(token) and job.state == "finishing" and not job.cancel
        done = self.do(
            claims.finish,
            token,
            final_checkpoint_id=row.id,
            fine_tuned_model="m",
            result_file_id=None,
        )
        assert done == expected
        if done:
            job.to("succeeded")

    # Left to chance, a wish hardly ever meets an attempt that is alive and about to end.
    @precondition(lambda self: any(job.runnable for job in self.model.values()))
    @rule(
        target=tokens,
        reached=st.integers(0, 2),
        wish=st.sampled_from(["cancel", "pause"]),
        end=st.sampled_from(["finish", "give_back", "fail", "lapse"]),
    )
    def attempt_ends_against_a_wish(self, reached, wish, end):
        token = self.claim()
        for move in [("starting", "running"), ("running", "finishing")][:reached]:
            self.move(token, move)
        getattr(self, wish)(token.job_id)
        self.beat(token, 0)
        if end == "finish":
            self.publish_and_finish(token, trained=True, cancelled_between=False)
        elif end == "give_back":
            self.give_back(token)
        elif end == "fail":
            self.fail(token, retryable=True)
        else:
            self.stall(token)
            self.reap()
        return token

    @rule(token=tokens, retryable=st.booleans())
    def fail(self, token, retryable):
        job = self.model[token.job_id]
        state = self.do(claims.fail, token, error=ERROR, retryable=retryable)
        if not job.accepts(token):
            assert state is None
            return
        job.errors += 1
        spent = not retryable or job.errors > job.max_errors
        expected = "cancelled" if job.cancel else "failed" if spent else job.wish("queued")
        assert state == expected
        self.to(job, expected)

    @rule(token=tokens)
    def give_back(self, token):
        job = self.model[token.job_id]
        state = self.do(claims.yield_, token)
        assert state == (job.wish("queued") if job.accepts(token) else None)
        if state is not None:
            self.to(job, state)

    @rule(token=tokens)
    def stall(self, token):
        if self.model[token.job_id].accepts(token):
            self.runner.run(self.site.lapse(token))
            self.model[token.job_id].lapsed = True

    @precondition(lambda self: self.model)
    @rule()
    def reap(self):
        dead = {key: job for key, job in self.model.items() if job.lapsed}
        reaped = self.do(claims.reap)
        assert {found.job_id for found in reaped} == set(dead)
        for found in reaped:
            job = dead[found.job_id]
            job.lost += 1
            expected = job.wish("failed" if job.lost > job.max_lost else "queued")
            assert found.state == expected
            self.to(job, expected)

    @rule()
    def relay(self):
        rung = []

        async def publish(queue):
            rung.append(queue)

        assert self.do(outbox.relay, publish, limit=1000) == self.owed == len(rung)
        self.owed = 0

    @rule(key=jobs)
    def cancel(self, key):
        job = self.model[key]
        if job.state in ("succeeded", "failed"):
            self.refused("cancel", job)
            return
        self.runner.run(self.site.may("cancel", job.public_id))
        if job.state in HELD:
            job.cancel = True
        elif job.state != "cancelled":
            job.cancel = True
            job.to("cancelled")

    @rule(key=jobs)
    def pause(self, key):
        job = self.model[key]
        if job.state in ENDS or (job.state in HELD and job.cancel):
            self.refused("pause", job)
            return
        self.runner.run(self.site.may("pause", job.public_id))
        if job.state == "queued":
            job.hold = False
            job.to("paused")
        elif job.state in HELD:
            job.pause = True

    @rule(key=jobs)
    def resume(self, key):
        job = self.model[key]
        if job.state in ENDS or (job.state in HELD and job.cancel):
            self.refused("resume", job)
            return
        self.runner.run(self.site.may("resume", job.public_id))
        if job.state == "paused":
            self.to(job, "queued")
        elif job.state == "queued" and job.hold:
            job.hold = False
            self.owed += 1
        elif job.state in HELD:
            job.pause = False

    def refused(self, move, job):
        with pytest.raises(Conflict):
            self.runner.run(self.site.may(move, job.public_id))

    @invariant()
    def rows_are_as_modelled(self):
        if not self.model:
            return
        for row, moves, seqs in self.runner.run(self.read()):
            job = self.model[row.id]
            assert (row.state, row.attempt, row.owner) == (job.state, job.attempt, job.owner)
            assert (row.error_count, row.lost_count) == (job.errors, job.lost)
            assert row.last_step == job.step
            assert (row.pause_requested_at is not None) == job.pause
            assert (row.cancel_requested_at is not None) == job.cancel
            assert (row.finished_at is not None) == (job.state in ENDS)
            assert row.hold == job.hold
            assert moves == job.moves
            assert seqs == list(range(1, row.last_event_seq + 1))

    async def read(self):
        async with self.db.session() as session:
            rows, _ = await JobRepository(session, self.site.project_id).list(limit=1000)
            events = await session.execute(
                text("select job_id, seq, to_state from job_events order by job_id, seq")
            )
            found = {row.id: (row, [], []) for row in rows}
            for job_id, seq, state in events:
                found[job_id][2].append(seq)
                if state is not None:
                    found[job_id][1].append(state)
            return list(found.values())


@pytest.mark.slow
def test_random_histories_follow_the_model(database_url):
    run_state_machine_as_test(
        lambda: Machine(database_url),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
