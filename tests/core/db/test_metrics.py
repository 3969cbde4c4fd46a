"""The series: every point was logged, spikes stay, growth moves nothing."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from core.db import metrics


def curve(steps, seed=0):
    draw = random.Random(seed)
    return [(step, {"train_loss": draw.random()}) for step in range(1, steps + 1)]


async def record(site, job, points, attempt=0):
    return await site.does(metrics.record, job.id, attempt, points)


async def drawn(site, job, **options):
    found = await site.does(metrics.series, job.id, **options)
    return {key: [(point.step, point.value) for point in points] for key, points in found.items()}


def expected(points, resolution):
    """The same choice, made in plain Python."""
    width = 1
    while math.ceil((points[-1][0] + 1) / width) > resolution and width < 2**40:
        width *= 2
    buckets = {}
    for step, values in points:
        buckets.setdefault(step // width, []).append((values["train_loss"], step))
    chosen = set()
    for rows in buckets.values():
        by_step = sorted(rows, key=lambda row: row[1])
        least = min(rows, key=lambda row: (row[0], row[1]))
        most = min(rows, key=lambda row: (-row[0], row[1]))
        chosen |= {(step, value) for value, step in (by_step[0], by_step[-1], least, most)}
    return sorted(chosen)


async def test_a_short_series_is_whole(site):
    job = await site.submit()
    points = curve(50)
    await record(site, job, points)
    assert await drawn(site, job) == {"train_loss": [(s, v["train_loss"]) for s, v in points]}


async def test_a_long_series_is_first_least_greatest_and_last_of_each_bucket(site):
    job = await site.submit()
    for steps in (7, 64, 65, 1000):
        await record(site, job, curve(steps))
        got = (await drawn(site, job, resolution=8))["train_loss"]
        assert got == expected(curve(steps), 8)
        assert len(got) <= 4 * 8


async def test_a_spike_is_never_lost(site):
    job = await site.submit()
    points = curve(2000)
    points[1236] = (1237, {"train_loss": 99.0})
    points[77] = (78, {"train_loss": -5.0})
    await record(site, job, points)
    for resolution in (1, 3, 10, 100):
        got = (await drawn(site, job, resolution=resolution))["train_loss"]
        assert (1237, 99.0) in got
        assert (78, -5.0) in got


async def test_growing_a_series_never_moves_an_old_point(site):
    """Closed buckets stay; when the width doubles, what is shown is a choice of what was."""
    job = await site.submit()
    points = curve(300)
    await record(site, job, points[:100])
    before = (await drawn(site, job, resolution=16))["train_loss"]
    await record(site, job, points[100:120])
    after = (await drawn(site, job, resolution=16))["train_loss"]
    closed = [point for point in before if point[0] < 96]  # width 8: [96, 104) was open
    assert [point for point in after if point[0] < 96] == closed
    await record(site, job, points[120:300])
    wider = (await drawn(site, job, resolution=16))["train_loss"]
    assert {point for point in wider if point[0] < 96} < set(closed)


async def test_a_part_of_the_series_has_the_same_points_as_the_whole(site):
    job = await site.submit()
    await record(site, job, curve(400))
    whole = (await drawn(site, job, resolution=16))["train_loss"]  # width 32
    part = (await drawn(site, job, resolution=16, step_from=64, step_to=400))["train_loss"]
    assert part == [point for point in whole if point[0] >= 64]


async def test_keys_are_separate_and_can_be_chosen(site):
    job = await site.submit()
    await record(site, job, [(1, {"a": 1.0, "b": 2.0}), (2, {"a": 3.0})])
    assert await drawn(site, job) == {"a": [(1, 1.0), (2, 3.0)], "b": [(1, 2.0)]}
    assert await drawn(site, job, keys=["b"]) == {"b": [(1, 2.0)]}
    latest = await site.does(metrics.latest, job.id)
    assert {key: (p.step, p.value) for key, p in latest.items()} == {"a": (2, 3.0), "b": (1, 2.0)}


async def test_a_later_attempt_overwrites_and_an_older_one_does_not(site):
    from core.db import claims

    job = await site.submit()
    first = await site.claimed()
    assert await record(site, job, [(1, {"a": 1.0}), (2, {"a": 2.0})], first.attempt)
    await site.does(claims.yield_, first)
    second = await site.claimed()
    assert await record(site, job, [(2, {"a": 20.0})], second.attempt)
    assert not await record(site, job, [(2, {"a": -1.0}), (3, {"a": -1.0})], first.attempt)
    assert await drawn(site, job) == {"a": [(1, 1.0), (2, 20.0)]}


async def test_said_twice_is_said_once(site):
    job = await site.submit()
    for _ in range(2):
        assert await record(site, job, [(1, {"a": 1.0}), (1, {"a": 4.0})])
    assert await drawn(site, job) == {"a": [(1, 4.0)]}
    assert await record(site, job, [])


async def test_rows_come_by_step_with_all_their_values(site):
    job = await site.submit()
    await record(site, job, [(2, {"b": 2.0}), (1, {"a": 1.0, "b": 1.5})])
    async with site.db.session() as s:
        found = [row async for row in metrics.rows(s, job.id)]
    assert found == [(1, {"a": 1.0, "b": 1.5}), (2, {"b": 2.0})]
    async with site.db.session() as s:
        assert [row async for row in metrics.rows(s, -1)] == []


@given(st.integers(1, 5000), st.integers(1, 300))
def test_the_reference_itself_keeps_within_its_resolution(steps, resolution):
    chosen = expected(curve(steps), resolution)
    assert len(chosen) <= 4 * resolution
    assert chosen[-1][0] == steps
