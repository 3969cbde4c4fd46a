"""Checkpoints: exist once complete, resumed newest first, skipped when corrupt."""

from __future__ import annotations

import pytest

from core.db import checkpoints, claims


async def names(site, job, **options):
    found = await site.does(checkpoints.list_checkpoints, job.id, **options)
    return [row.step for row in found[0]], found[1]


async def test_the_most_advanced_good_checkpoint_is_resumed(site):
    job = await site.submit()
    claim = await site.claimed()
    for step in (10, 20):
        await site.checkpoint(claim, step)
    await site.checkpoint(claim, 30, kinds=["export"])
    await site.does(claims.yield_, claim)
    second = await site.claimed()
    await site.checkpoint(second, 15)
    order = [row.step for row in await site.does(checkpoints.resumable, job.id)]
    assert order == [20, 15, 10]
    newest = await site.does(checkpoints.newest_resumable, job.id)
    await site.does(checkpoints.mark_corrupt, newest.id)
    assert (await site.does(checkpoints.newest_resumable, job.id)).step == 15


async def test_the_newer_of_two_at_one_step_is_resumed(site):
    job = await site.submit()
    await site.checkpoint(first := await site.claimed(), 10)
    await site.does(claims.yield_, first)
    await site.checkpoint(second := await site.claimed(), 10)
    assert (await site.does(checkpoints.newest_resumable, job.id)).attempt == second.attempt


async def test_retention_offers_all_but_the_newest(site):
    job = await site.submit()
    claim = await site.claimed()
    for step in (10, 20, 30, 40):
        await site.checkpoint(claim, step)
    offered = await site.does(checkpoints.retention_candidates, job.id)
    assert [row.step for row in offered] == [20, 10]
    await site.does(checkpoints.mark_resume_dropped, offered[0].id)
    offered = await site.does(checkpoints.retention_candidates, job.id)
    assert [row.step for row in offered] == [10]
    # Whatever is asked for, the one that a resume needs stays.
    kept = await site.does(checkpoints.retention_candidates, job.id, keep=0)
    assert 40 not in [row.step for row in kept]


async def test_said_twice_is_one_checkpoint(site):
    job = await site.submit()
    claim = await site.claimed()
    first = await site.checkpoint(claim, 5, metrics={"train_loss": 1.0})
    again = await site.checkpoint(claim, 5, metrics={"valid_loss": 2.0}, final=True)
    assert again.public_id == first.public_id
    assert again.final
    assert again.metrics == {"train_loss": 1.0, "valid_loss": 2.0}
    assert await names(site, job) == ([5], False)


async def test_a_checkpoint_is_found_by_every_name_it_has(site):
    job, stranger = await site.submit(), await site.submit()
    claim = await site.claimed()
    good = await site.checkpoint(claim, 10, metrics={"valid_loss": 0.5})
    await site.checkpoint(claim, 20, metrics={"valid_loss": 0.9})
    last = await site.checkpoint(claim, 30, kinds=["resume"])

    async def find(name, job_id=job.id):
        row = await site.does(checkpoints.get, job_id, name)
        return None if row is None else row.step

    assert await find("best") == 10
    assert await find("latest") == 20
    assert await find("step-30") == 30
    assert await find(last.public_id) == 30
    for name in ("step-11", "step-x", "step-" + "9" * 40, "nothing"):
        assert await find(name) is None
    assert await find(good.public_id, stranger.id) is None


async def test_without_a_validation_loss_the_newest_is_the_best(site):
    job = await site.submit()
    claim = await site.claimed()
    for step in (10, 20):
        await site.checkpoint(claim, step)
    assert (await site.does(checkpoints.get, job.id, "best")).step == 20


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages(site, order):
    job = await site.submit()
    claim = await site.claimed()
    rows = [await site.checkpoint(claim, step) for step in (1, 2, 3)]
    steps = [1, 2, 3] if order == "asc" else [3, 2, 1]
    assert await names(site, job, order=order, limit=2) == (steps[:2], True)
    cursor = rows[1].public_id
    assert await names(site, job, order=order, after=cursor) == (steps[2:], False)
    assert await site.does(checkpoints.list_checkpoints, job.id, after="ftckpt_none") is None


async def test_ended_jobs_resume_halves_are_offered_for_removal_but_for_the_newest(site):
    await site.submit()
    claim = await site.claimed()
    old = await site.checkpoint(claim, 1)
    new = await site.checkpoint(claim, 2)
    assert await site.does(checkpoints.unresumable_ended) == []
    await site.may("cancel", claim.public_id)
    await site.does(claims.yield_, claim)
    assert [found.id for found in await site.does(checkpoints.unresumable_ended)] == [old.id]
    await site.does(checkpoints.mark_corrupt, new.id)
    assert await site.does(checkpoints.unresumable_ended) == []
