"""What the database itself refuses, whoever writes."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from core.db import claims, events
from core.db.tables import OutboxRow
from core.ids import ALPHABET, EVENT, LENGTH, new_id

ERROR = {"code": "x", "message": "it broke"}


async def write(site, sql, **values):
    async with site.db.begin() as s:
        await s.execute(text(sql), values)


@pytest.mark.parametrize("change", ["attempt + 1", "attempt - 1", "0"])
async def test_the_attempt_grows_with_a_claim_and_never_else(site, change):
    await site.submit()
    claim = await site.claimed()
    with pytest.raises(DBAPIError, match="outside a claim"):
        await write(site, f"update jobs set attempt = {change} where id = :id", id=claim.job_id)


async def test_a_claim_that_does_not_count_is_refused(site):
    job = await site.submit()
    with pytest.raises(DBAPIError, match="outside a claim"):
        await write(
            site,
            "update jobs set state = 'starting', owner = 'o', lease_until = now() where id = :id",
            id=job.id,
        )


@pytest.mark.parametrize(
    "change",
    ["fine_tuned_model = 'mine'", "error = null", "last_step = 7", "cancel_requested_at = now()"],
)
async def test_an_ended_row_is_frozen(site, change):
    job = await site.submit()
    claim = await site.claimed()
    await site.does(claims.fail, claim, error=ERROR, retryable=False)
    with pytest.raises(DBAPIError, match="frozen"):
        await write(site, f"update jobs set {change} where id = :id", id=job.id)


async def test_an_ended_job_may_still_be_labelled_and_commented(site):
    job = await site.submit()
    await site.may("cancel", job.public_id)
    await write(site, 'update jobs set metadata = \'{"a": "b"}\' where id = :id', id=job.id)
    row = await site.does(events.append, job.id, kind="warning", message="late")
    assert row.seq == 3


async def test_a_queued_job_that_nobody_may_claim_cannot_exist(site):
    job = await site.submit()
    with pytest.raises(DBAPIError, match="jobs_queued_is_runnable"):
        await write(site, "update jobs set pause_requested_at = now() where id = :id", id=job.id)


async def test_a_success_without_a_result_cannot_exist(site):
    await site.submit()
    claim = await site.claimed()
    await site.does(claims.move, claim, "starting", "running")
    await site.does(claims.move, claim, "running", "finishing")
    with pytest.raises(DBAPIError, match="jobs_result"):
        await write(
            site,
            "update jobs set state = 'succeeded', owner = null, lease_until = null where id = :id",
            id=claim.job_id,
        )


async def test_every_way_into_the_queue_owes_one_wake_up(site):
    async def owed():
        async with site.db.session() as s:
            return await s.scalar(text("select count(*) from outbox"))

    job = await site.submit()
    assert await owed() == 1
    await site.does(claims.yield_, await site.claimed())
    assert await owed() == 2
    await site.does(claims.fail, await site.claimed(), error=ERROR, retryable=True)
    assert await owed() == 3
    await site.lapse(await site.claimed())
    await site.does(claims.reap)
    assert await owed() == 4
    await site.may("pause", job.public_id)
    await site.may("resume", job.public_id)
    assert await owed() == 5
    held = await site.submit(hold=True)
    assert await owed() == 5
    await site.may("resume", held.public_id)
    assert await owed() == 6


async def test_a_wake_up_after_an_error_waits_for_the_backoff(site):
    await site.submit()
    claim = await site.claimed()
    await site.does(claims.fail, claim, error=ERROR, retryable=True, backoff_s=3600.0)
    async with site.db.session() as s:
        latest = await s.scalar(
            text("select max(not_before) > clock_timestamp() + interval '59 min' from outbox")
        )
    assert latest
    assert OutboxRow.__tablename__ == "outbox"


async def test_the_story_says_why(site):
    job = await site.submit(max_errors=1, max_lost=0)
    await site.does(claims.yield_, await site.claimed())
    await site.does(claims.fail, await site.claimed(), error=ERROR, retryable=True)
    await site.lapse(await site.claimed())
    await site.does(claims.reap)
    rows = await site.does(events.events_after, job.id, 0)
    assert [(row.level, row.kind, row.message) for row in rows] == [
        ("info", "status", f"Created fine-tuning job: {job.public_id}"),
        ("info", "status", "Attempt 1 was claimed by a worker"),
        ("info", "status", "Attempt 1 was given back by its worker; the job waits"),
        ("info", "status", "Attempt 2 was claimed by a worker"),
        ("warn", "retry", "Attempt 2 failed and will be retried: it broke"),
        ("info", "status", "Attempt 3 was claimed by a worker"),
        (
            "error",
            "status",
            "The job failed: the job's worker was lost again and again without one new step",
        ),
    ]
    assert rows[4].data == {"code": "x"}


async def test_ids_made_by_the_database_look_like_ours(site):
    async with site.db.session() as s:
        drawn = await s.scalars(
            text("select new_public_id(:p) from generate_series(1, 500)"), {"p": EVENT}
        )
        found = list(drawn)
    assert len(set(found)) == 500
    shape = re.compile(f"^{EVENT}[0-9A-Za-z]{{{LENGTH}}}$")
    assert all(shape.match(one) for one in (*found, new_id(EVENT)))
    # All characters turn up, and at every place more than a few: none is a constant.
    assert set("".join(one.removeprefix(EVENT) for one in found)) == set(ALPHABET)
    places = zip(*(one.removeprefix(EVENT) for one in found), strict=True)
    assert all(len(set(place)) > 40 for place in places)
