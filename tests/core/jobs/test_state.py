"""The table of moves against a second copy written by hand, and against the database's guard."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from core.jobs.state import NEXT, OWNED, STATUS, TERMINAL, State, advance, states_of
from tunery.errors import Conflict

# Written out, not read from NEXT: "from: to, to".
MOVES = """
validating: queued, failed, cancelled
queued: starting, paused, cancelled
starting: running, queued, paused, failed, cancelled
running: finishing, queued, paused, failed, cancelled
finishing: succeeded, queued, paused, failed, cancelled
paused: queued, cancelled
succeeded:
failed:
cancelled:
"""
LEGAL = {
    (source, target.strip())
    for source, targets in (line.split(":") for line in MOVES.strip().splitlines())
    for target in targets.split(",")
    if target.strip()
}
ENDS = {"succeeded", "failed", "cancelled"}
HELD = {"starting", "running", "finishing"}
PAIRS = list(itertools.product(State, State))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_advance_allows_exactly_the_legal_moves(source, target):
    if (source.value, target.value) in LEGAL:
        assert advance(source, target) is target
    else:
        with pytest.raises(Conflict) as refusal:
            advance(source, target)
        assert refusal.value.code == "invalid_job_state"


def test_the_ends_and_the_held_states_are_these():
    assert {state.value for state in TERMINAL} == ENDS
    assert {state.value for state in OWNED} == HELD


@pytest.mark.parametrize("state", State)
def test_only_an_end_has_no_way_out(state):
    assert (not NEXT[state]) is (state.value in ENDS)


def test_the_world_sees_seven_statuses():
    assert {state.value: status for state, status in STATUS.items()} == {
        "validating": "validating_files",
        "queued": "queued",
        "starting": "running",
        "running": "running",
        "finishing": "running",
        "paused": "paused",
        "succeeded": "succeeded",
        "failed": "failed",
        "cancelled": "cancelled",
    }
    assert {state.value for state in states_of("running")} == HELD
    assert states_of("no such status") == frozenset()


@given(st.lists(st.sampled_from(list(State)), max_size=30))
def test_no_walk_leaves_an_end_or_succeeds_without_training(wishes):
    state, trail = State.VALIDATING, [State.VALIDATING]
    for wish in wishes:
        try:
            state = advance(state, wish)
        except Conflict:
            continue
        trail.append(state)
    names = [state.value for state in trail]
    assert not any(name in ENDS for name in names[:-1])
    if names[-1] == "succeeded":
        assert names[-4:] == ["starting", "running", "finishing", "succeeded"]
    for held in HELD & set(names):
        assert "starting" in names[: names.index(held) + 1]


# --- the guard in the database -------------------------------------------------------------------

OWNER = "owner = case when :target in ('starting', 'running', 'finishing') then 'o' end"
LEASE = "lease_until = case when :target in ('starting', 'running', 'finishing') then now() end"
RESULT = "final_checkpoint_id = case when :target = 'succeeded' then cast(:result as bigint) end"


async def put_in_state(session, job_id, state, result):
    """Write a state past the guard, consistent with every other constraint."""
    await session.execute(text("set local session_replication_role = replica"))
    await session.execute(
        text(f"update jobs set state = :target, {OWNER}, {LEASE}, {RESULT} where id = :id"),
        {"target": state, "id": job_id, "result": result},
    )
    await session.execute(text("set local session_replication_role = origin"))


async def try_move(site, job_id, source, target, result):
    async with site.db.session() as session:
        await put_in_state(session, job_id, source, result)
        attempt = "attempt = attempt + (:source = 'queued' and :target = 'starting')::int"
        await session.execute(
            text(
                f"update jobs set state = :target, {attempt}, {OWNER}, {LEASE}, {RESULT}"
                " where id = :id"
            ),
            {"source": source, "target": target, "id": job_id, "result": result},
        )
        rows = await session.execute(
            text("select from_state, to_state from job_events where job_id = :id and seq = 2"),
            {"id": job_id},
        )
        return [tuple(row) for row in rows]


async def test_the_guard_holds_the_same_table(site):
    job = await site.submit()
    checkpoint = await site.checkpoint(await site.claimed())
    await_free = await site.submit()
    for source, target in PAIRS:
        if source is target:
            continue
        arguments = site, await_free.id, source.value, target.value, checkpoint.id
        if (source.value, target.value) in LEGAL:
            assert await try_move(*arguments) == [(source.value, target.value)]
        else:
            expected = "frozen" if source.value in ENDS else "illegal transition"
            with pytest.raises(DBAPIError, match=expected):
                await try_move(*arguments)
    assert job.id != await_free.id
