"""The bell between a submission and the reconciler."""

from __future__ import annotations

import asyncio

from api.deps import Bell


async def test_one_ring_is_heard_soon_and_a_burst_of_them_once_in_a_while() -> None:
    bell = Bell(soon_s=0.01, pause_s=0.2)
    clock = asyncio.get_running_loop().time
    heard: list[float] = []
    began = clock()
    for _ in range(3):
        for _ in range(50):
            bell.ring()
        assert not bell.heard.is_set()
        await asyncio.wait_for(bell.heard.wait(), 5)
        bell.heard.clear()
        heard.append(clock() - began)
    assert heard[0] < 0.2
    assert heard[1] - heard[0] > 0.15
    assert heard[2] - heard[1] > 0.15
    await asyncio.sleep(0.3)
    assert not bell.heard.is_set(), "nobody rang again"
