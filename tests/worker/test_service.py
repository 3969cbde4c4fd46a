"""A job's whole life in a real worker: Celery, supervisor, lifeline, warm pool, fake trainer."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from core.db import metrics
from core.db.tables import FileRow
from tests.worker.conftest import SECRET, until

if TYPE_CHECKING:
    from tests.worker.conftest import Farm


async def test_a_job_trains_and_leaves_everything_it_should(farm: Farm) -> None:
    worker = await farm.worker()
    job = await farm.submit(steps=12, checkpoint_every=5)
    row = await farm.reaches(job, "succeeded")
    assert (row.attempt, row.last_step, row.total_steps) == (1, 12, 12)
    assert row.fine_tuned_model == f"ft:tiny:main::{job.removeprefix('ftjob-')}"
    assert row.trained_tokens == 48
    assert row.peak_memory_bytes == 1 << 20
    assert row.gpu_seconds > 0
    assert row.facts is not None
    assert row.facts["features"] == {"fake": True}
    found = await farm.checkpoints(job)
    assert [(c.step, c.final) for c in found] == [(5, False), (10, False), (12, True)]
    assert row.final_checkpoint_id == found[-1].id
    async with farm.db.session() as session:
        result = await session.get(FileRow, row.result_file_id)
    assert result is not None
    assert (result.purpose, result.content_type) == ("fine-tune-results", "text/csv")
    table = list(csv.DictReader(io.StringIO((await farm.bytes_of(result.store_key)).decode())))
    assert list(table[0])[:5] == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
    ]
    assert [int(line["step"]) for line in table] == list(range(1, 13))
    assert float(table[3]["train_loss"]) == pytest.approx(1 / 5)
    assert "trainer.started" in worker.text()
    assert '"warm": true' in worker.text()
    await farm.oracle()


async def test_neither_the_worker_nor_its_pool_loads_torch(farm: Farm) -> None:
    """Looked up in the memory maps: what a process has loaded cannot hide from the kernel."""
    worker = await farm.worker()
    await farm.submit(steps=200)
    await farm.trainer()
    for pid in (worker.popen.pid, *worker.children()):
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


async def test_the_trainer_sees_no_secret(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(steps=200)
    pid = await farm.trainer()
    scratch = Path(f"/proc/{pid}/cwd").readlink()
    await until((scratch / "seen.json").exists)
    seen = json.loads((scratch / "seen.json").read_text())["environ"]
    started_with = Path(f"/proc/{pid}/environ").read_bytes().decode()
    for secret in (SECRET, farm.settings.database_url.get_secret_value(), "TUNERY_", "AWS_"):
        assert secret not in json.dumps(seen)
        assert secret not in started_with
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["HF_HUB_OFFLINE"] == "1"
    await farm.wish("cancel", job)
    await farm.reaches(job, "cancelled")


async def test_metrics_reach_the_record_within_two_seconds(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(steps=1000, step_s=0.05, checkpoint_every=1000)
    row = await farm.steps(job, 1)
    await asyncio.sleep(1.0)
    async with farm.db.session() as session:
        latest = await metrics.latest(session, row.id)
    pid = await farm.trainer()
    assert pid
    assert latest["train_loss"].step >= 5
    await farm.wish("cancel", job)
    await farm.reaches(job, "cancelled")


async def test_one_worker_serves_several_devices_and_jobs_of_several(farm: Farm) -> None:
    await farm.worker(TUNERY_DEVICES="cpu:2")
    singles = [await farm.submit(steps=60, checkpoint_every=100) for _ in range(2)]
    await until(lambda: len(farm.trainers()) == 2)
    both = await farm.submit(steps=3, gpus=2)
    await asyncio.sleep(0.5)
    assert (await farm.job(both)).state == "queued"
    for job in (*singles, both):
        await farm.reaches(job, "succeeded")
    await farm.oracle()


async def test_a_backlog_on_one_queue_does_not_hide_another(farm: Farm) -> None:
    await farm.worker(TUNERY_QUEUES="default,other")
    first, second, third = [await farm.submit(steps=20, step_s=0.05) for _ in range(3)]
    await farm.steps(first, 1)
    async with farm.db.begin() as session:
        await session.execute(text("update jobs set priority = -1 where state = 'queued'"))
    elsewhere = await farm.submit(steps=3, queue="other")
    await farm.reaches(elsewhere, "succeeded")
    assert (await farm.job(third)).state == "queued"
    for job in (second, third):
        await farm.reaches(job, "succeeded")
    await farm.oracle()


async def test_a_pool_child_leaks_no_descriptor_and_no_folder(farm: Farm) -> None:
    worker = await farm.worker()
    (child,) = worker.children()
    open_after = []
    for _ in range(4):
        job = await farm.submit(steps=2)
        await farm.reaches(job, "succeeded")
        await until(lambda: not list(farm.settings.resolved_scratch_dir().iterdir()))
        await asyncio.sleep(0.3)
        open_after.append(len(list(Path(f"/proc/{child}/fd").iterdir())))
    assert open_after[-1] <= open_after[1]
    assert worker.children() == [child]


async def test_a_worker_describes_itself_and_takes_its_row_away(farm: Farm) -> None:
    from core.db import workers

    worker = await farm.worker("w1")

    async def views() -> list[workers.WorkerView]:
        async with farm.db.session() as session:
            return await workers.list_workers(session)

    (view,) = await until(views)
    assert (view.row.name, view.row.pid, view.status) == ("w1", worker.popen.pid, "idle")
    assert view.row.cached_models == ["tiny"]
    assert view.row.devices[0]["kind"] == "cpu"
    assert "torch" in view.row.versions
    worker.popen.terminate()
    assert await worker.gone() == 0
    assert await views() == []


async def test_the_solo_pool_is_refused() -> None:
    from types import SimpleNamespace

    from worker.app import refuse_solo

    refuse_solo(SimpleNamespace(pool_cls="prefork"))
    with pytest.raises(SystemExit, match="solo"):
        refuse_solo(SimpleNamespace(pool_cls="celery.concurrency.solo:TaskPool"))
