"""One job after another through the claim, and every write that a lease holder may make."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import text

from core.db import claims, events
from core.db.claims import Progress
from core.db.tables import ProjectRow

ERROR = {"code": "out_of_memory", "message": "too big", "param": None, "retriable": True}


async def to_finishing(site, claim):
    assert await site.does(claims.move, claim, "starting", "running")
    assert await site.does(claims.move, claim, "running", "finishing")


async def finish(site, claim, **options):
    row = await site.checkpoint(claim, final=True)
    return await site.does(
        claims.finish,
        claim,
        **{
            "final_checkpoint_id": row.id,
            "fine_tuned_model": "ft:tiny",
            "result_file_id": None,
            **options,
        },
    )


async def story(site, claim):
    rows = await site.does(events.events_after, claim.job_id, 0)
    return [(row.seq, row.from_state, row.to_state) for row in rows if row.to_state]


async def test_a_job_goes_from_claim_to_success(site):
    job = await site.submit()
    claim = await site.claimed()
    assert (claim.public_id, claim.attempt) == (job.public_id, 1)
    assert (await site.get(job.public_id)).phase == "preparing"
    await to_finishing(site, claim)
    assert await finish(site, claim, trained_tokens=77)
    row = await site.get(job.public_id)
    assert (row.state, row.phase, row.owner, row.lease_until) == ("succeeded", "done", None, None)
    assert (row.fine_tuned_model, row.trained_tokens) == ("ft:tiny", 77)
    assert row.finished_at is not None
    assert await story(site, claim) == [
        (1, None, "queued"),
        (2, "queued", "starting"),
        (3, "starting", "running"),
        (4, "running", "finishing"),
        (5, "finishing", "succeeded"),
    ]


async def test_there_is_nothing_to_claim_twice(site):
    await site.submit()
    assert await site.claim() is not None
    assert await site.claim() is None


async def test_claims_of_one_job_at_the_same_instant_issue_one_attempt(site):
    job = await site.submit()
    found = await asyncio.gather(*(site.claim() for _ in range(12)))
    assert sum(claim is not None for claim in found) == 1
    assert (await site.get(job.public_id)).attempt == 1


async def test_competing_claims_lose_no_job(site):
    for _ in range(12):
        await site.submit()
    found = await asyncio.gather(*(site.claim() for _ in range(12)))
    assert len({claim.job_id for claim in found if claim}) == 12


@pytest.mark.parametrize(
    "columns",
    [
        {"queue": "elsewhere"},
        {"gpus": 2},
        {"hold": True},
        {"state": "validating"},
    ],
    ids=str,
)
async def test_what_does_not_suit_is_not_claimed(site, columns):
    await site.submit(**columns)
    assert await site.claim() is None


async def test_a_job_in_backoff_is_not_claimed_before_its_time(site):
    job = await site.submit()
    claim = await site.claimed()
    state = await site.does(claims.fail, claim, error=ERROR, retryable=True, backoff_s=60.0)
    assert state == "queued"
    assert (await site.get(job.public_id)).phase == "backing_off"
    assert await site.claim() is None


async def test_priority_comes_before_age(site):
    await site.submit()
    urgent = await site.submit(priority=1)
    assert (await site.claimed()).job_id == urgent.id


async def test_age_decides_within_a_project(site):
    first = await site.submit()
    await site.submit()
    assert (await site.claimed()).job_id == first.id


async def test_a_model_that_is_held_comes_before_age(site):
    await site.submit(model="cold")
    warm = await site.submit(model="warm")
    assert (await site.claimed(cached_models=["warm"])).job_id == warm.id


async def test_projects_take_turns_whoever_asked_first(site, other):
    mine = {(await site.submit()).id for _ in range(6)}
    theirs = {(await other.submit()).id for _ in range(6)}
    order = [(await site.claimed()).job_id in mine for _ in range(8)]
    assert order.count(True) == 4
    assert theirs


async def test_weight_gives_a_larger_share(new_site):
    heavy = await new_site("heavy", weight=3.0)
    light = await new_site("light", weight=1.0)
    for _ in range(12):
        await light.submit()
        await heavy.submit()
    taken = [(await heavy.claimed()).project_id for _ in range(12)]
    assert taken.count(heavy.project_id) == 9


async def test_past_use_counts_and_fades(site, other):
    await site.submit()
    theirs = await other.submit()

    async def used(seconds, days):
        async with site.db.begin() as s:
            project = await s.get(ProjectRow, site.project_id)
            project.gpu_usage = seconds
            project.gpu_usage_at = await s.scalar(
                text("select clock_timestamp() - make_interval(days => :d)"), {"d": days}
            )
            other_project = await s.get(ProjectRow, other.project_id)
            other_project.gpu_usage = 100.0

    await used(1000.0, days=0)
    claim = await site.claimed()
    assert claim.job_id == theirs.id
    await site.does(claims.yield_, claim)
    await used(1000.0, days=5)
    assert (await site.claimed()).project_id == site.project_id


async def test_an_ended_attempt_is_charged_to_its_project(site):
    job = await site.submit(gpus=2)
    claim = await site.claimed(gpus_free=2)
    await asyncio.sleep(0.1)
    assert await site.does(claims.yield_, claim) == "queued"
    async with site.db.session() as s:
        project = await s.get(ProjectRow, site.project_id)
    spent = (await site.get(job.public_id)).gpu_seconds
    assert spent >= 0.2
    assert project.gpu_usage == pytest.approx(spent, rel=0.2)


async def test_a_reaped_attempt_is_charged_until_its_last_beat(site):
    await site.submit()
    claim = await site.claimed()
    await asyncio.sleep(0.05)
    await site.does(claims.beat, claim, ttl_s=30.0)
    await site.lapse(claim)
    await site.does(claims.reap)
    async with site.db.session() as s:
        assert 0.05 <= (await s.get(ProjectRow, site.project_id)).gpu_usage < 5


async def test_a_beat_renews_and_tells(site):
    job = await site.submit()
    claim = await site.claimed(ttl_s=5.0)
    before = await site.get(job.public_id)
    said = Progress(phase="training", total_steps=10, epoch=0.5, facts={"packing": True})
    orders = await site.does(claims.beat, claim, ttl_s=50.0, step=3, progress=said)
    assert (orders.cancel, orders.pause, orders.checkpoint) == (False, False, None)
    row = await site.get(job.public_id)
    assert (row.lease_until - before.lease_until).total_seconds() > 40
    assert (row.last_step, row.total_steps, row.epoch) == (3, 10, 0.5)
    assert (row.phase, row.facts) == ("training", {"packing": True})
    # What a beat does not say stays.
    await site.does(claims.beat, claim, ttl_s=50.0, step=2, progress=Progress(epoch=0.6))
    row = await site.get(job.public_id)
    assert (row.last_step, row.total_steps, row.epoch) == (3, 10, 0.6)


async def test_a_beat_learns_of_cancel_pause_and_checkpoint(site):
    job = await site.submit()
    claim = await site.claimed()
    await site.does(claims.move, claim, "starting", "running")
    await site.may("request_checkpoint", job.public_id)
    asked = await site.does(claims.beat, claim, ttl_s=30.0)
    assert asked.checkpoint is not None
    await site.checkpoint(claim)
    assert (await site.does(claims.beat, claim, ttl_s=30.0)).checkpoint is None
    await site.may("pause", job.public_id)
    assert (await site.does(claims.beat, claim, ttl_s=30.0)).pause
    assert (await site.get(job.public_id)).phase == "pausing"
    await site.may("cancel", job.public_id)
    assert (await site.does(claims.beat, claim, ttl_s=30.0)).cancel
    assert (await site.get(job.public_id)).phase == "cancelling"


async def test_errors_have_a_budget(site):
    job = await site.submit(max_errors=2)
    outcomes = []
    for _ in range(3):
        claim = await site.claimed()
        outcomes.append(await site.does(claims.fail, claim, error=ERROR, retryable=True))
    assert outcomes == ["queued", "queued", "failed"]
    row = await site.get(job.public_id)
    assert (row.error, row.error_count, row.lost_count) == (ERROR, 3, 0)


async def test_what_cannot_be_retried_fails_at_once(site):
    await site.submit(max_errors=5)
    claim = await site.claimed()
    assert await site.does(claims.fail, claim, error=ERROR, retryable=False) == "failed"


async def test_a_new_claim_forgets_the_last_error(site):
    job = await site.submit()
    await site.does(claims.fail, await site.claimed(), error=ERROR, retryable=True)
    assert (await site.get(job.public_id)).error == ERROR
    await site.claimed()
    assert (await site.get(job.public_id)).error is None


async def test_losses_have_a_budget_of_their_own(site):
    job = await site.submit(max_lost=2, max_errors=0)
    states = []
    for _ in range(3):
        claim = await site.claimed()
        await site.lapse(claim)
        states += [reaped.state for reaped in await site.does(claims.reap)]
    assert states == ["queued", "queued", "failed"]
    row = await site.get(job.public_id)
    assert (row.error["code"], row.error_count) == ("worker_lost", 0)


async def test_progress_pays_the_loss_budget_back(site):
    job = await site.submit(max_lost=1)
    for step in range(1, 5):
        claim = await site.claimed()
        await site.does(claims.beat, claim, ttl_s=30.0, step=step)
        await site.lapse(claim)
        assert [reaped.state for reaped in await site.does(claims.reap)] == ["queued"]
    # The same step again is no progress.
    claim = await site.claimed()
    await site.does(claims.beat, claim, ttl_s=30.0, step=4)
    await site.lapse(claim)
    assert [reaped.state for reaped in await site.does(claims.reap)] == ["failed"]
    assert (await site.get(job.public_id)).attempt == 5


async def test_a_live_lease_is_not_reaped(site):
    await site.submit()
    await site.claimed()
    assert await site.does(claims.reap) == []


@pytest.mark.parametrize(
    ("wish", "state"), [("cancel", "cancelled"), ("pause", "paused"), (None, "queued")]
)
@pytest.mark.parametrize("stage", ["starting", "running", "finishing"])
@pytest.mark.parametrize("end", ["yield", "reap", "fail"])
async def test_every_end_of_an_attempt_obeys_what_was_asked(site, wish, state, stage, end):
    job = await site.submit()
    claim = await site.claimed()
    if stage != "starting":
        await site.does(claims.move, claim, "starting", "running")
    if stage == "finishing":
        await site.does(claims.move, claim, "running", "finishing")
    if wish:
        await site.may(wish, job.public_id)
    if end == "yield":
        assert await site.does(claims.yield_, claim) == state
    elif end == "fail":
        assert await site.does(claims.fail, claim, error=ERROR, retryable=True) == state
    else:
        await site.lapse(claim)
        assert [reaped.state for reaped in await site.does(claims.reap)] == [state]
    row = await site.get(job.public_id)
    assert row.state == state
    assert row.pause_requested_at is None
    if wish is None:
        assert (await site.claimed()).attempt == 2


async def test_a_yield_costs_no_budget(site):
    job = await site.submit(max_errors=0, max_lost=0)
    for _ in range(3):
        assert await site.does(claims.yield_, await site.claimed()) == "queued"
    row = await site.get(job.public_id)
    assert (row.error_count, row.lost_count, row.attempt) == (0, 0, 3)


async def test_a_cancel_wins_over_a_finish(site):
    job = await site.submit()
    claim = await site.claimed()
    await to_finishing(site, claim)
    await site.may("cancel", job.public_id)
    assert not await finish(site, claim)
    assert await site.does(claims.yield_, claim) == "cancelled"
    row = await site.get(job.public_id)
    assert (row.final_checkpoint_id, row.fine_tuned_model) == (None, None)


# --- the fence ---------------------------------------------------------------------------------

WRITES = ["beat", "move", "finish", "fail", "yield_", "holds", "checkpoint"]


async def write(site, claim, name):
    """Try one write of a lease holder; True when it was let through."""
    if name == "beat":
        return await site.does(claims.beat, claim, ttl_s=30.0, step=99) is not None
    if name == "move":
        return await site.does(claims.move, claim, "finishing", "finishing")
    if name == "finish":
        return await site.does(
            claims.finish,
            claim,
            final_checkpoint_id=site.checkpoint_id,
            fine_tuned_model="stale",
            result_file_id=None,
        )
    if name == "fail":
        return await site.does(claims.fail, claim, error=ERROR, retryable=True) is not None
    if name == "yield_":
        return await site.does(claims.yield_, claim) is not None
    if name == "holds":
        return await site.does(claims.holds, claim)
    return await site.checkpoint(claim, step=99) is not None


async def zombie_of_an_older_attempt(site):
    """Two attempts; the row is held by the second, and the first shows its own token."""
    await site.submit()
    old = await site.claimed()
    await site.lapse(old)
    await site.does(claims.reap)
    new = await site.claimed()
    await to_finishing(site, new)
    site.checkpoint_id = (await site.checkpoint(new)).id
    return old, new


async def zombies(site):
    """Tokens that are wrong in exactly one way, by the fence's term that has to notice."""
    other_job = await site.submit(hold=True)
    old, new = await zombie_of_an_older_attempt(site)
    # A promoted replica forgot a claim: the attempt's number is used twice, the owner is not.
    yield "owner", replace(new, owner=old.owner)
    yield "attempt", replace(new, attempt=old.attempt)
    yield "id", replace(new, job_id=other_job.id)
    await site.lapse(new)
    yield "lease", new


@pytest.mark.parametrize("name", WRITES)
async def test_a_stale_writer_touches_no_row(site, name):
    checked = []
    async for term, claim in zombies(site):
        before = await snapshot(site)
        assert not await write(site, claim, name), term
        assert await snapshot(site) == before
        checked.append(term)
    assert sorted(checked) == ["attempt", "id", "lease", "owner"]


@pytest.mark.parametrize("name", WRITES)
async def test_the_live_writer_is_let_through(site, name):
    _, new = await zombie_of_an_older_attempt(site)
    assert await write(site, new, name)


@pytest.mark.parametrize("term", ["id", "attempt", "owner", "lease"])
async def test_every_term_of_the_fence_is_needed(site, monkeypatch, term):
    """Without any one of them, some stale write goes through: the test above can fail."""
    monkeypatch.delitem(claims.FENCE, term)
    passed = [
        await write(site, claim, "beat") async for wrong, claim in zombies(site) if wrong == term
    ]
    assert passed == [True]


async def snapshot(site):
    async with site.db.session() as s:
        rows = await s.execute(text("select to_jsonb(j) from jobs j order by id"))
        return [row[0] for row in rows]
