"""What goes wrong in production, on purpose. After every fault the same oracle."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr
from sqlalchemy import text as sql

from core.db import logs, metrics, workers
from core.db.engine import Database
from core.db.migrate import upgrade
from core.local.broker import EmbeddedBroker
from core.local.postgres import EmbeddedPostgres
from tests.worker.conftest import open_farm, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from core.db.tables import JobEventRow
    from core.settings import Settings
    from tests.worker.conftest import Farm

SMALL_DISK_BYTES = 64 * 1024
SLOWLY = {"steps": 60, "step_s": 0.05, "checkpoint_every": 10}


# Losing processes --------------------------------------------------------------------------------


async def test_a_killed_worker_loses_at_most_one_checkpoint_interval(farm: Farm) -> None:
    first = await farm.worker("first")
    job = await farm.submit(**SLOWLY)
    await until(lambda: farm.checkpoints(job))
    first.signal(signal.SIGKILL)
    killed = time.monotonic()
    await until(lambda: not farm.trainers())
    assert time.monotonic() - killed < 1.5
    await farm.worker("second")
    row = await farm.reaches(job, "succeeded")
    assert row.attempt == 2
    assert row.lost_count == 0  # paid back by progress
    assert row.error_count == 0
    assert row.resumed_from_step is not None
    assert row.resumed_from_step >= 10
    await farm.oracle()


@pytest.mark.slow
async def test_a_killed_pool_child_is_replaced_and_the_job_resumes(farm: Farm) -> None:
    worker = await farm.worker()
    job = await farm.submit(**SLOWLY)
    await until(lambda: farm.checkpoints(job))
    (child,) = worker.children()
    os.kill(child, signal.SIGKILL)
    await until(lambda: not farm.trainers())
    row = await farm.reaches(job, "succeeded")
    assert row.attempt == 2
    await farm.oracle()


async def test_a_trainer_killed_by_the_kernel_is_an_error_not_a_loss(farm: Farm) -> None:
    await farm.worker()
    fault = {"1": {"at": 15, "kill": 9, "print": "last words"}}
    job = await farm.submit(**SLOWLY | {"step_s": 0.02}, faults=fault)
    row = await farm.reaches(job, "succeeded")
    assert (row.attempt, row.error_count, row.lost_count) == (2, 1, 0)
    assert row.resumed_from_step == 10
    (said,) = [event for event in await farm.events(job) if event.level == "error"]
    assert said.data["code"] == "out_of_memory"
    assert "last words" in said.data["log"]
    await farm.oracle()


@pytest.mark.slow
async def test_a_frozen_supervisor_loses_its_trainer_and_writes_nothing_when_it_thaws(
    farm: Farm,
) -> None:
    first = await farm.worker("first")
    job = await farm.submit(**SLOWLY)
    await until(lambda: farm.checkpoints(job))
    (child,) = first.children()
    os.kill(child, signal.SIGSTOP)
    frozen = time.monotonic()
    await until(lambda: not farm.trainers(), 5)
    assert time.monotonic() - frozen < 3.0  # before the lease lapses
    await farm.worker("second")
    await until(lambda: len(farm.trainers()) == 1)
    os.kill(child, signal.SIGCONT)
    row = await farm.reaches(job, "succeeded")
    assert (row.attempt, row.worker) == (2, "second")
    await until(lambda: '"state": "fenced"' in first.text())
    moves = [event for event in await farm.events(job) if event.to_state]
    assert [(move.attempt, move.to_state) for move in moves if move.attempt == 1] == [
        (1, "starting"),
        (1, "running"),
        (1, "queued"),
    ]
    await farm.oracle()


async def test_the_warm_pool_is_started_again_and_jobs_go_on(farm: Farm) -> None:
    worker = await farm.worker()
    children = Path(f"/proc/{worker.popen.pid}/task/{worker.popen.pid}/children")
    (server,) = set(map(int, children.read_text().split())) - set(worker.children())
    job = await farm.submit(**SLOWLY)
    await farm.steps(job, 1)
    os.kill(server, signal.SIGKILL)
    row = await farm.reaches(job, "succeeded")
    assert row.attempt == 1
    again = await farm.submit(steps=3)
    await farm.reaches(again, "succeeded")
    await farm.oracle()


# Deliveries --------------------------------------------------------------------------------------


async def test_fifty_duplicate_deliveries_start_one_attempt(farm: Farm) -> None:
    await farm.worker("first")
    await farm.worker("second")
    job = await farm.submit(steps=30, step_s=0.05)
    for _ in range(50):
        await asyncio.to_thread(farm.broker.wake, "default")
    row = await farm.reaches(job, "succeeded")
    for _ in range(5):
        await asyncio.to_thread(farm.broker.wake, "default")
    await until(lambda: farm.broker.waiting("default") == 0)
    await asyncio.sleep(0.5)
    row = await farm.job(job)
    assert (row.state, row.attempt) == ("succeeded", 1)
    await farm.oracle()


# Wishes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["queued", "starting", "running", "saving"])
async def test_a_cancelled_job_ends_cancelled_in_every_phase(farm: Farm, when: str) -> None:
    config: dict[str, object] = dict(SLOWLY)
    if when == "starting":
        config = {"steps": 100, "faults": {"*": {"hang": True}}}
    if when == "saving":
        config = {"steps": 3, "checkpoint_s": 3.0}
    if when != "queued":
        await farm.worker()
    job = await farm.submit(**config)
    if when == "starting":
        await farm.trainer()
        assert (await farm.job(job)).state == "starting"
    if when in ("running", "saving"):
        await farm.steps(job, 1)
    asked = time.monotonic()
    await farm.wish("cancel", job)
    row = await farm.reaches(job, "cancelled")
    assert time.monotonic() - asked < 5.0
    assert row.final_checkpoint_id is None
    await farm.wish("cancel", job)  # again: nothing happens
    await farm.oracle()


async def test_a_cancel_that_meets_the_commit_leaves_no_result(farm: Farm) -> None:
    await farm.worker(TUNERY_LEASE_S="30", TUNERY_BEAT_S="10")
    job = await farm.submit(steps=3)
    async with farm.db.begin() as session:
        await session.execute(sql("lock table files in share mode"))  # the result's row waits
        row = await farm.reaches(job, "finishing")
        results = f"files/{farm.project_id}"
        await until(lambda: _count(farm, results, 2))  # its bytes are there already
        await farm.wish("cancel", job)
    row = await farm.reaches(job, "cancelled")
    assert (row.final_checkpoint_id, row.result_file_id, row.fine_tuned_model) == (None,) * 3
    assert await _count(farm, results, 1)
    await farm.oracle()


async def _count(farm: Farm, prefix: str, wanted: int) -> bool:
    """Whether the store has so many keys there."""
    return len([key async for key in farm.store.list(prefix)]) == wanted


async def test_a_paused_job_saves_and_goes_on_where_it_was(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(**SLOWLY | {"checkpoint_every": 1000})
    await farm.steps(job, 5)
    await farm.wish("pause", job)
    row = await farm.reaches(job, "paused")
    (saved,) = await farm.checkpoints(job)
    assert saved.step >= 5
    assert (row.error_count, row.lost_count) == (0, 0)
    await until(lambda: not farm.trainers())
    await farm.wish("resume", job)
    row = await farm.reaches(job, "succeeded")
    assert (row.attempt, row.resumed_from_step) == (2, saved.step)
    await farm.oracle()


async def test_a_checkpoint_is_made_on_request_while_training_goes_on(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(**SLOWLY | {"checkpoint_every": 1000})
    await farm.steps(job, 3)
    await farm.wish("request_checkpoint", job)
    (made,) = await until(lambda: farm.checkpoints(job))
    assert made.step < 60
    row = await farm.reaches(job, "succeeded")
    assert len(await farm.checkpoints(job)) == 2
    assert row.attempt == 1
    await farm.oracle()


# Drain -------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_sigterm_drains_with_a_checkpoint_and_exit_0(farm: Farm) -> None:
    worker = await farm.worker("first")
    job = await farm.submit(**SLOWLY | {"checkpoint_every": 1000, "checkpoint_s": 1.0})
    await farm.steps(job, 3)
    worker.signal(signal.SIGTERM)
    assert await worker.gone() == 0
    row = await farm.job(job)
    assert row.state == "queued"
    assert (row.error_count, row.lost_count) == (0, 0)
    (saved,) = await farm.checkpoints(job)
    assert not farm.trainers()
    assert list(farm.settings.resolved_scratch_dir().iterdir()) == []
    await farm.worker("second")
    row = await farm.reaches(job, "succeeded")
    assert row.resumed_from_step == saved.step
    await farm.oracle()


async def test_a_trainer_that_ignores_sigterm_is_killed_after_the_grace(farm: Farm) -> None:
    worker = await farm.worker("first")
    job = await farm.submit(**SLOWLY | {"steps": 1000}, faults={"1": {"ignore_sigterm": True}})
    await until(lambda: farm.checkpoints(job))
    worker.signal(signal.SIGTERM)
    began = time.monotonic()
    assert await worker.gone() == 0
    assert time.monotonic() - began < 12.0
    row = await farm.job(job)
    assert (row.state, row.error_count, row.lost_count) == ("queued", 0, 0)
    await farm.wish("cancel", job)
    await farm.oracle()


async def test_a_drain_asked_for_in_the_record_is_obeyed_and_can_be_taken_back(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(**SLOWLY)
    await farm.steps(job, 2)
    async with farm.db.begin() as session:
        (view,) = await workers.list_workers(session)
        assert await workers.drain(session, view.row.public_id)
    await farm.reaches(job, "queued")
    await asyncio.sleep(1.5)  # the bell rings, and nobody comes
    assert (await farm.job(job)).state == "queued"
    async with farm.db.begin() as session:
        assert await workers.undrain(session, view.row.public_id)
    await farm.reaches(job, "succeeded")
    await farm.oracle()


# Trainers that misbehave -------------------------------------------------------------------------


async def test_a_silent_trainer_is_killed_and_the_job_retried(farm: Farm) -> None:
    await farm.worker(TUNERY_NO_PROGRESS_S="2")
    job = await farm.submit(**SLOWLY | {"step_s": 0.01}, faults={"1": {"at": 25, "hang": True}})
    row = await farm.reaches(job, "succeeded")
    assert (row.attempt, row.error_count, row.resumed_from_step) == (2, 1, 20), await farm.story(
        job
    )
    assert "no_progress" in [event.data.get("code") for event in await farm.events(job)]
    await farm.oracle()


async def test_a_failure_that_the_user_must_fix_is_not_retried(farm: Farm) -> None:
    await farm.worker()
    failure = {
        "code": "no_trainable_tokens",
        "category": "user_data",
        "retryable": False,
        "message": "nothing to learn",
        "hint": "look at the rows",
    }
    job = await farm.submit(steps=5, faults={"*": {"failure": failure}})
    row = await farm.reaches(job, "failed")
    assert row.attempt == 1
    assert row.error == {
        "code": "no_trainable_tokens",
        "message": "nothing to learn",
        "param": None,
        "category": "user_data",
        "retriable": False,
        "hint": "look at the rows",
    }
    await farm.oracle()


async def test_an_error_budget_ends(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(steps=5, faults={"*": {"exit": 3}})
    row = await farm.reaches(job, "failed")
    assert (row.attempt, row.error_count) == (4, 4)
    assert row.error is not None
    assert row.error["code"] == "internal_error"
    assert "code 3" in row.error["message"]
    await farm.oracle()


async def test_the_runtime_limit_stops_with_a_checkpoint(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(**SLOWLY | {"steps": 1000, "checkpoint_every": 999}, max_runtime_s=1)
    row = await farm.reaches(job, "failed")
    assert row.error is not None
    assert row.error["code"] == "time_limit"
    assert len(await farm.checkpoints(job)) == 1
    await farm.oracle()


async def test_what_a_trainer_leaves_behind_is_gone(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(steps=5, faults={"*": {"orphan": True}})
    await farm.reaches(job, "succeeded")
    assert farm.trainers() == []
    await farm.oracle()


async def test_a_flood_of_output_is_cut_and_delays_no_heartbeat(farm: Farm) -> None:
    await farm.worker()
    fault = {"*": {"flood_bytes": 64 << 20, "print": "before the flood"}}
    job = await farm.submit(steps=20, faults=fault)
    row = await farm.reaches(job, "succeeded")
    assert row.attempt == 1
    async with farm.db.session() as session:
        chunks = await logs.after(session, row.id)
    text = "".join(chunk.text for chunk in chunks)
    assert text.startswith("before the flood\n")
    assert "bytes left out]" in text
    assert len(text) < 20_000 + 80_000
    await farm.oracle()


async def test_a_report_that_takes_long_is_not_lost_when_the_trainer_ends(farm: Farm) -> None:
    await farm.worker(TUNERY_LEASE_S="30", TUNERY_BEAT_S="10")
    failure = {"code": "x", "category": "unknown", "retryable": False, "message": "m"}
    fault = {"*": {"at": 9, "failure": failure}}
    job = await farm.submit(steps=20, step_s=0.3, checkpoint_every=100, faults=fault)
    await farm.steps(job, 1)
    async with farm.db.begin() as session:
        await session.execute(sql("lock table job_metrics in share mode"))
        await until(lambda: not farm.trainers())
    row = await farm.reaches(job, "failed")
    async with farm.db.session() as session:
        steps = [step async for step, _ in metrics.rows(session, row.id)]
    assert steps == list(range(1, 9))
    await farm.oracle()


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "missing"])
async def test_a_corrupt_checkpoint_is_passed_over_for_an_older_one(
    farm: Farm, damage: str
) -> None:
    await farm.worker()
    job = await farm.submit(**SLOWLY)
    await farm.steps(job, 25)
    await farm.wish("pause", job)
    await farm.reaches(job, "paused")
    rows = await farm.checkpoints(job)
    newest = max(rows, key=lambda row: row.step)
    files = list((farm.settings.home / "artifacts").rglob(f"*{newest.prefix}/resume/state.json"))
    assert len(files) == 1
    if damage == "truncated":
        files[0].chmod(0o600)
        files[0].write_bytes(files[0].read_bytes()[:-3])
    else:
        files[0].unlink()
    await farm.wish("resume", job)
    row = await farm.reaches(job, "succeeded")
    older = max(row.step for row in rows if row.id != newest.id)
    assert row.resumed_from_step == older
    marked = [row.step for row in await farm.checkpoints(job) if row.corrupt_at is not None]
    assert marked == [newest.step]
    codes = [event.data.get("code") for event in await farm.events(job)]
    assert "checkpoint_corrupt" in codes
    await farm.oracle()


async def test_only_the_newest_resume_halves_are_kept_and_every_export(farm: Farm) -> None:
    await farm.worker()
    job = await farm.submit(steps=20, checkpoint_every=4, keep=2)
    await farm.reaches(job, "succeeded")
    rows = await farm.checkpoints(job)
    assert [row.step for row in rows] == [4, 8, 12, 16, 20]
    assert [row.resume_dropped_at is None for row in rows] == [False, False, False, True, True]
    for row in rows:
        keys = {key async for key in farm.store.list(row.prefix)}
        kept = row.resume_dropped_at is None
        assert (f"{row.prefix}/resume/state.json" in keys) is kept
        assert f"{row.prefix}/export/adapter_model.safetensors" in keys
    await farm.oracle()


# The world around --------------------------------------------------------------------------------


async def test_a_base_model_that_is_gone_fails_by_name(farm: Farm) -> None:
    await farm.worker()
    shutil.rmtree(farm.settings.resolved_models_dir() / "tiny")
    job = await farm.submit(steps=3)
    row = await farm.reaches(job, "failed")
    assert row.error is not None
    assert row.error["code"] == "base_model_unavailable"
    await farm.oracle()


async def test_a_worker_whose_disk_is_full_leaves_the_job_to_another(
    farm: Farm, small_disk: Path
) -> None:
    full = await farm.worker("full", TUNERY_SCRATCH_DIR=str(small_disk))
    (small_disk / "somebody's").write_bytes(bytes(SMALL_DISK_BYTES - 4096))
    job = await farm.submit(steps=3)
    (said,) = await until(lambda: _errors(farm, job))
    assert (said.data["code"], said.attempt) == ("capacity_unavailable", 1)
    await farm.worker("roomy")
    row = await farm.reaches(job, "succeeded")
    assert (row.worker, row.attempt, row.error_count) == ("roomy", 2, 1)
    assert full.popen.poll() is None
    await farm.oracle()


async def _errors(farm: Farm, job: str) -> list[JobEventRow]:
    return [event for event in await farm.events(job) if event.level == "error"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is soon full."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = f"size={SMALL_DISK_BYTES}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
async def test_a_broker_that_stops_and_forgets_delays_only_what_waits(
    settings: Settings, db: Database, tmp_path: Path, servers_dir: Path
) -> None:
    with EmbeddedBroker(servers_dir / "own-broker", persistent=False) as broker:
        own = settings.model_copy(update={"broker_url": SecretStr(broker.url)})
        async with open_farm(own, db, tmp_path) as farm:
            await farm.worker()
            running = await farm.submit(**SLOWLY)
            await farm.steps(running, 1)
            broker.stop()
            waiting = await farm.submit(steps=3)
            row = await farm.reaches(running, "succeeded")
            assert row.attempt == 1
            # Done with one job, the supervisor looks for the next: no bell needed.
            await farm.reaches(waiting, "succeeded")
            later = await farm.submit(steps=3)
            broker.start()
            await farm.reaches(later, "succeeded", within_s=45)
            await farm.oracle()


@pytest.mark.slow
async def test_a_postgres_that_restarts_costs_no_attempt(
    settings: Settings, broker_url: str, tmp_path: Path, servers_dir: Path
) -> None:
    async with own_postgres(settings, servers_dir / "own-pg-1", tmp_path) as (farm, postgres):
        await farm.worker(TUNERY_LEASE_S="12")
        job = await farm.submit(**SLOWLY)
        await farm.steps(job, 5)
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(postgres.start)
        row = await farm.reaches(job, "succeeded")
        assert (row.attempt, row.error_count, row.lost_count) == (1, 0, 0)
        async with farm.db.session() as session:
            steps = [step async for step, _ in metrics.rows(session, row.id)]
        assert steps == list(range(1, 61))  # nothing was lost in between
        await farm.oracle()


@pytest.mark.slow
async def test_a_postgres_that_is_away_for_long_stops_training_and_fails_nothing(
    settings: Settings, broker_url: str, tmp_path: Path, servers_dir: Path
) -> None:
    async with own_postgres(settings, servers_dir / "own-pg-2", tmp_path) as (farm, postgres):
        await farm.worker()
        job = await farm.submit(**SLOWLY | {"steps": 120})
        await until(lambda: farm.checkpoints(job))
        await asyncio.to_thread(postgres.stop)
        stopped = time.monotonic()
        await until(lambda: not farm.trainers())
        assert time.monotonic() - stopped < 8.0
        await asyncio.sleep(3.0)
        await asyncio.to_thread(postgres.start)
        row = await farm.reaches(job, "succeeded", within_s=60)
        assert row.attempt >= 2
        assert row.error_count == 0
        assert row.resumed_from_step is not None
        await farm.oracle()


@asynccontextmanager
async def own_postgres(
    settings: Settings, folder: Path, tmp_path: Path
) -> AsyncIterator[tuple[Farm, EmbeddedPostgres]]:
    """A farm on a Postgres that may be stopped."""
    with EmbeddedPostgres(folder, durable=False) as postgres:
        await asyncio.to_thread(upgrade, postgres.url)
        own = settings.model_copy(update={"database_url": SecretStr(postgres.url)})
        db = Database(postgres.url, pool_size=8)
        try:
            async with open_farm(own, db, tmp_path) as farm:
                yield farm, postgres
        finally:
            await db.close()


@pytest.mark.slow
async def test_two_workers_share_a_burst_without_a_job_run_twice(farm: Farm) -> None:
    await farm.worker("first")
    await farm.worker("second")
    jobs = [await farm.submit(steps=4, checkpoint_every=100) for _ in range(12)]
    rows = [await farm.reaches(job, "succeeded", within_s=40) for job in jobs]
    assert [row.attempt for row in rows] == [1] * 12
    assert {row.worker for row in rows} == {"first", "second"}
    await farm.oracle()
