"""Our own client talks to the real service: what it parses is what the routes say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest_asyncio

from tunery.client import AsyncTunery, calls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.api.conftest import Service, Worker

ROWS = Path(__file__).parents[2] / "examples" / "support-json" / "validation.jsonl"


@pytest_asyncio.fixture
async def ours(service: Service, key: str) -> AsyncIterator[AsyncTunery]:
    async with AsyncTunery(key, service.url) as client:
        yield client


async def test_a_jobs_whole_life_is_read_back(
    ours: AsyncTunery, worker: Worker, base_model: str, data_file: str, tmp_path: Path
) -> None:
    body: dict[str, Any] = {"model": base_model, "training_file": data_file}
    assert (await ours.jobs.dry_run(**body))["object"] == "fine_tuning.job.dry_run"
    job = await ours.jobs.create(**body)
    assert job.label == "supervised-lora"
    claim = await worker.claim()
    await worker.step(claim, 1, train_loss=2.5, tokens_per_second=800.0)
    await worker.step(claim, 2, train_loss=1.25)
    await worker.save(claim, 2, train_loss=1.25)

    points = await ours.jobs.metrics(job.id)
    assert points.series("train_loss") == [(1, 2.5), (2, 1.25)]
    assert points.series("tokens_per_second") == [(1, 800.0)]
    one = await ours.jobs.metrics(job.id, ["train_loss"], resolution=1)
    assert list(one.points) == ["train_loss"]

    events = [event async for event in ours.jobs.events(job.id)]
    assert [e.message for e in events if e.kind == "metrics"] == ["Step 1", "Step 2"]
    (saved,) = [row async for row in ours.checkpoints.list(job.id)]
    assert (saved.step_number, saved.metrics["train_loss"]) == (2, 1.25)
    manifest = await ours.checkpoints.download(job.id, tmp_path)
    assert "adapter" in {file.role for file in manifest}
    assert all((tmp_path / file.path).stat().st_size == file.bytes for file in manifest)

    assert (await ours.jobs.cancel(job.id)).id == job.id
    assert [row.id async for row in ours.jobs.list()] == [job.id]


async def test_files_and_what_stands_around_jobs(ours: AsyncTunery, base_model: str) -> None:
    file = await ours.files.upload(ROWS)
    assert (await ours.files.get(file.id)).bytes == ROWS.stat().st_size
    found = await ours.files.validation(file.id)
    assert found is not None
    assert (found["format"], found["problem_counts"]) == ("chat", {})
    assert file.id in [row["id"] for row in (await ours.send(calls.list_files(None)))["data"]]
    assert base_model in [row["id"] for row in await ours.models()]
    assert await ours.send(calls.list_workers()) == []
    assert "version" in await ours.send(calls.version())
    assert (await ours.send(calls.delete_file(file.id)))["deleted"] is True
