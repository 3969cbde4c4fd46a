"""What a project's users may do with its jobs, and that they can reach no other project's."""

from __future__ import annotations

from datetime import timedelta

import pytest

from core.db import claims, events
from core.db.jobs import JobRepository
from tunery.errors import Conflict, InvalidConfig

MOVES = ["get", "cancel", "pause", "resume", "request_checkpoint"]


async def state(site, job):
    return (await site.get(job.public_id)).state


async def running(site):
    job = await site.submit()
    claim = await site.claimed()
    await site.does(claims.move, claim, "starting", "running")
    return job, claim


async def ended(site, how):
    job, claim = await running(site)
    if how == "failed":
        await site.does(claims.fail, claim, error={"code": "x"}, retryable=False)
    elif how == "cancelled":
        await site.may("cancel", job.public_id)
        await site.does(claims.yield_, claim)
    else:
        await site.does(claims.move, claim, "running", "finishing")
        row = await site.checkpoint(claim)
        assert await site.does(
            claims.finish,
            claim,
            final_checkpoint_id=row.id,
            fine_tuned_model="m",
            result_file_id=None,
        )
    return job


@pytest.mark.parametrize("move", MOVES)
async def test_another_projects_job_does_not_exist(site, other, move):
    job, _ = await running(site)
    assert await other.may(move, job.public_id) is None
    row = await site.get(job.public_id)
    assert (row.cancel_requested_at, row.pause_requested_at, row.state) == (None, None, "running")
    assert row.checkpoint_requested_at is None


async def test_another_projects_jobs_are_not_listed_nor_usable_as_a_cursor(site, other):
    theirs = await other.submit()
    mine = await site.submit()
    async with site.db.session() as s:
        repository = JobRepository(s, site.project_id)
        rows, more = await repository.list()
        assert ([row.id for row in rows], more) == ([mine.id], False)
        with pytest.raises(InvalidConfig) as refusal:
            await repository.list(after=theirs.public_id)
    assert refusal.value.param == "after"


async def test_insert_belongs_to_the_repositorys_project_whatever_is_asked(site, other):
    job = await site.submit(project_id=other.project_id)
    assert job.project_id == site.project_id


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_show_every_job_once_and_end(site, order):
    ids = [(await site.submit()).public_id for _ in range(7)]
    seen, after, more = [], None, True
    while more:
        async with site.db.session() as s:
            rows, more = await JobRepository(s, site.project_id).list(
                after=after, limit=3, order=order
            )
        assert rows
        seen += [row.public_id for row in rows]
        after = seen[-1]
    assert seen == (ids if order == "asc" else ids[::-1])


async def test_filters_narrow(site):
    plain = await site.submit()
    dpo = await site.submit(method="dpo", model="big", metadata_={"team": "a", "run": "1"})
    await site.may("cancel", plain.public_id)
    cases = [
        ({"states": ["cancelled"]}, plain),
        ({"states": ["queued"]}, dpo),
        ({"method": "dpo"}, dpo),
        ({"model": "tiny"}, plain),
        ({"metadata": {"team": "a"}}, dpo),
        ({"metadata": {"team": "b"}}, None),
        ({"created_after": dpo.created_at}, dpo),
        ({"created_before": dpo.created_at - timedelta(microseconds=1)}, plain),
    ]
    for filters, wanted in cases:
        async with site.db.session() as s:
            rows, _ = await JobRepository(s, site.project_id).list(**filters)
        assert [row.id for row in rows] == ([wanted.id] if wanted else []), filters


@pytest.mark.parametrize("start", ["validating", "queued", "paused", "held"])
async def test_cancel_is_immediate_where_nobody_runs_the_job(site, start):
    columns = {"validating": {"state": "validating"}, "held": {"hold": True}}.get(start, {})
    job = await site.submit(**columns)
    if start == "paused":
        await site.may("pause", job.public_id)
    row = await site.may("cancel", job.public_id)
    assert (row.state, row.phase) == ("cancelled", "done")
    assert (await site.may("cancel", job.public_id)).finished_at == row.finished_at


async def test_cancel_of_a_running_job_is_a_wish_recorded_once(site):
    job, claim = await running(site)
    first = await site.may("cancel", job.public_id)
    assert (first.state, first.phase) == ("running", "cancelling")
    again = await site.may("cancel", job.public_id)
    assert again.cancel_requested_at == first.cancel_requested_at
    asked = [e for e in await site.does(events.events_after, claim.job_id, 0) if e.kind == "phase"]
    assert len(asked) == 1
    assert await site.does(claims.yield_, claim) == "cancelled"


async def test_cancel_with_a_dead_worker_is_done_by_the_reaper(site):
    job, claim = await running(site)
    await site.may("cancel", job.public_id)
    await site.lapse(claim)
    assert [reaped.state for reaped in await site.does(claims.reap)] == ["cancelled"]


@pytest.mark.parametrize(
    ("how", "move", "allowed"),
    [
        ("succeeded", "cancel", False),
        ("failed", "cancel", False),
        ("cancelled", "cancel", True),
        ("succeeded", "pause", False),
        ("failed", "pause", False),
        ("cancelled", "pause", False),
        ("succeeded", "resume", False),
        ("failed", "resume", False),
        ("cancelled", "resume", False),
        ("succeeded", "request_checkpoint", False),
    ],
)
async def test_an_ended_job_stays_as_it_is(site, how, move, allowed):
    job = await ended(site, how)
    if allowed:
        assert (await site.may(move, job.public_id)).state == how
        return
    with pytest.raises(Conflict) as refusal:
        await site.may(move, job.public_id)
    assert refusal.value.code == "invalid_job_state"
    assert how in str(refusal.value)


async def test_pause_and_resume_of_a_waiting_job(site):
    job = await site.submit()
    for _ in range(2):
        assert (await site.may("pause", job.public_id)).state == "paused"
    assert await site.claim() is None
    for _ in range(2):
        assert (await site.may("resume", job.public_id)).state == "queued"
    assert await site.claim() is not None


async def test_a_running_job_pauses_when_its_worker_obeys(site):
    job, claim = await running(site)
    for _ in range(2):
        row = await site.may("pause", job.public_id)
        assert (row.state, row.phase) == ("running", "pausing")
    assert await site.does(claims.yield_, claim) == "paused"
    row = await site.get(job.public_id)
    assert (row.pause_requested_at, row.phase) == (None, "paused")
    await site.may("resume", job.public_id)
    assert (await site.claimed()).attempt == 2


async def test_a_pause_can_be_taken_back_before_it_is_obeyed(site):
    job, claim = await running(site)
    await site.may("pause", job.public_id)
    row = await site.may("resume", job.public_id)
    assert (row.state, row.phase, row.pause_requested_at) == ("running", "training", None)
    # A worker that was stopping already gives the job back, and it is queued.
    assert await site.does(claims.yield_, claim) == "queued"


async def test_a_job_being_cancelled_cannot_be_paused_or_resumed(site):
    job, _ = await running(site)
    await site.may("cancel", job.public_id)
    for move in ("pause", "resume"):
        with pytest.raises(Conflict, match="being cancelled"):
            await site.may(move, job.public_id)


async def test_a_held_job_starts_by_hand(site):
    job = await site.submit(hold=True)
    assert await site.claim() is None
    assert not (await site.may("resume", job.public_id)).hold
    assert (await site.claimed()).public_id == job.public_id


async def test_a_resume_may_add_to_the_error_budget(site):
    job = await site.submit(max_errors=1)
    await site.may("pause", job.public_id)
    assert (await site.may("resume", job.public_id, max_extra_errors=2)).max_errors == 3


async def test_a_checkpoint_can_be_asked_of_a_running_job_only(site):
    job = await site.submit()
    with pytest.raises(Conflict, match="queued"):
        await site.may("request_checkpoint", job.public_id)
    claim = await site.claimed()
    await site.does(claims.move, claim, "starting", "running")
    assert (await site.may("request_checkpoint", job.public_id)).checkpoint_requested_at
    await site.does(claims.yield_, claim)
    assert (await site.get(job.public_id)).checkpoint_requested_at is None


async def test_the_place_in_the_queue(site):
    late = await site.submit()
    urgent = await site.submit(priority=5)
    held = await site.submit(hold=True)
    async with site.db.session() as s:
        repository = JobRepository(s, site.project_id)
        places = [await repository.queue_position(job) for job in (urgent, late, held)]
    assert places == [1, 2, None]
