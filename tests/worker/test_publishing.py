"""Checkpoints on their way into a store that fails: one attempt, in this process, on a real store.

The lifeline and the trainer are processes as always; only the store is wrapped.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from core.db import claims
from core.db.engine import Database
from tests.worker.conftest import LAUNCHER, ROOT, until
from tunery.errors import StoreUnavailable, TooLarge
from tunery.models import ModelStore
from worker import prepare
from worker.attempt import Attempt
from worker.tools import Tools

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Sequence
    from pathlib import Path

    from core.artifacts.stores import ArtifactStore
    from tests.worker.conftest import Farm
    from tunery.errors import AppError

LAST_FILE = "/resume/state.json"
"""What a checkpoint's upload ends with, but for its manifest."""


class Faulty:
    """A store whose puts below `jobs/` fail as told; all else is the real store's."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self.refuses: AppError | None = None
        """Raised for the last file of each checkpoint, before a byte of it is written."""
        self.forgetful = False
        """Whether the answer to the first put of each key is lost, its bytes written."""
        self.refused: Counter[str] = Counter()
        self.wrote: list[str] = []
        self._forgot: set[str] = set()

    async def put(self, key: str, data: AsyncIterable[bytes] | Path) -> int:
        if self.refuses is not None and key.startswith("jobs/") and key.endswith(LAST_FILE):
            self.refused[key] += 1
            raise self.refuses
        size = await self._store.put(key, data)
        self.wrote.append(key)
        if self.forgetful and key not in self._forgot:
            self._forgot.add(key)
            raise StoreUnavailable("the answer was lost")
        return size

    def get(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        return self._store.get(key, start, end)

    async def size(self, key: str) -> int:
        return await self._store.size(key)

    def list(self, prefix: str) -> AsyncIterator[str]:
        return self._store.list(prefix)

    async def delete(self, key: str) -> None:
        await self._store.delete(key)

    async def delete_prefix(self, prefix: str) -> int:
        return await self._store.delete_prefix(prefix)

    async def sweep(self, older_than_s: float) -> int:
        return await self._store.sweep(older_than_s)

    async def ping(self) -> None:
        await self._store.ping()


@pytest.fixture
def faulty(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """The farm's store, which can be told to fail."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the trainer's, to find the launcher by
    return Faulty(farm.store)


async def carry_out(farm: Farm, store: ArtifactStore) -> str | None:
    """Claim the next job and make one attempt at it; returns the state that it was left in."""
    settings = farm.settings.model_copy(
        update={"launcher": LAUNCHER, "retry_backoff_s": 0.0, "trainer_threads": 1}
    )
    beats = Database(settings.database_url.get_secret_value(), pool_size=1)
    models = ModelStore(settings.resolved_models_dir())
    tools = Tools(settings, farm.db, beats, store, models, None, 1, lambda: False, lambda: None)
    began = time.monotonic()
    async with farm.db.begin() as session:
        claim = await claims.claim_next(
            session, queues=["default"], gpus_free=1, worker="here", ttl_s=settings.lease_s
        )
    assert claim is not None
    try:
        return await Attempt(tools, claim, (), began).run()
    finally:
        await beats.close()


async def check_nothing_twice_or_half(
    farm: Farm, store: Faulty, job: str, steps: Sequence[int]
) -> None:
    """Each key was written once, and each belongs to a checkpoint that was told of once."""
    assert set(Counter(store.wrote).values()) == {1}
    rows = await farm.checkpoints(job)
    named = {f"{row.prefix}/{entry['path']}" for row in rows for entry in row.manifest}
    named |= {f"{row.prefix}/manifest.json" for row in rows}
    assert {key async for key in farm.store.list("jobs")} == named
    told = [event.data["step"] for event in await farm.events(job) if event.kind == "checkpoint"]
    assert told == [row.step for row in rows] == list(steps)


@pytest.mark.slow
async def test_a_store_that_comes_back_costs_a_job_nothing(farm: Farm, faulty: Faulty) -> None:
    faulty.refuses = StoreUnavailable("away")
    job = await farm.submit(steps=12, step_s=0.05, checkpoint_every=5)
    attempt = asyncio.create_task(carry_out(farm, faulty))
    await until(lambda: faulty.refused)
    lease = (await farm.job(job)).lease_until
    assert lease is not None
    await farm.steps(job, 12)  # the trainer goes on, to its end

    async def outlived() -> bool:
        now = (await farm.job(job)).lease_until
        return now is not None and (now - lease).total_seconds() > farm.settings.lease_s

    await until(outlived)  # without heartbeats it would be somebody else's by now
    ((key, tries),) = faulty.refused.items()  # in order: the later ones wait for the first
    assert "/step-00000005/" in key
    assert tries > 1
    assert await farm.checkpoints(job) == []  # half of one lies there and is none
    assert [key for key in faulty.wrote if key.endswith("manifest.json")] == []
    faulty.refuses = None
    assert await attempt == "succeeded"
    row = await farm.job(job)
    assert (row.attempt, row.error_count, row.lost_count) == (1, 0, 0)
    await check_nothing_twice_or_half(farm, faulty, job, [5, 10, 12])
    await farm.oracle()


async def test_a_put_whose_answer_is_lost_is_not_made_twice(farm: Farm, faulty: Faulty) -> None:
    job = await farm.submit(steps=4)
    faulty.forgetful = True
    assert await carry_out(farm, faulty) == "succeeded"
    row = await farm.job(job)
    assert (row.attempt, row.error_count) == (1, 0)
    await check_nothing_twice_or_half(farm, faulty, job, [4])
    await farm.oracle()


async def test_a_store_that_stays_away_ends_the_attempt_and_not_the_job(
    farm: Farm, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "PATIENCE_S", 0.5)
    faulty.refuses = StoreUnavailable("away")
    job = await farm.submit(steps=1000, checkpoint_every=5)
    assert await carry_out(farm, faulty) == "queued"
    assert farm.trainers() == []
    row = await farm.job(job)
    assert (row.error_count, row.lost_count) == (1, 0)
    (said,) = [event for event in await farm.events(job) if event.level == "error"]
    assert said.data["code"] == "artifact_store_error"
    assert await farm.checkpoints(job) == []
    async with farm.db.begin() as session:  # so that the next error is the last that is forgiven
        await session.execute(text("update jobs set error_count = 3"))
    assert await carry_out(farm, faulty) == "failed"
    row = await farm.job(job)
    assert row.error is not None
    assert (row.error["code"], row.error["retriable"]) == ("artifact_store_error", True)
    assert (row.error["category"], row.attempt) == ("platform", 2)
    await farm.oracle()


async def test_what_a_store_will_never_take_is_offered_once(farm: Farm, faulty: Faulty) -> None:
    faulty.refuses = TooLarge("more than this store can create in one piece")
    job = await farm.submit(steps=1000, checkpoint_every=5)
    assert await carry_out(farm, faulty) == "failed"
    row = await farm.job(job)
    assert row.error is not None
    assert (row.attempt, row.error["retriable"]) == (1, False)
    assert list(faulty.refused.values()) == [1]
    assert farm.trainers() == []
    assert await farm.checkpoints(job) == []
    await farm.oracle()
