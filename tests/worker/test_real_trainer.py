"""The worker with the trainer that ships: real weights, real steps."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from core.db import checkpoints, metrics
from tests.worker.conftest import until
from tunery.models import ModelStore
from tunery.models.importing import import_model
from tunery.request import parse_request
from tunery.resolve import resolve
from tunery.spec import DataFile

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worker.conftest import Farm
    from tunery.spec import TrainingSpec

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STOCK = {"TUNERY_LAUNCHER": "tunery.training.launch:launch"}
NAMES = ("Lily", "Tom", "Max", "Ann")
ROWS = [
    {
        "prompt": f"Once upon a time there was {NAMES[n % 4]}.",
        "completion": f" {NAMES[n % 4]} had {n} red balls and a dog who liked to run in the park.",
    }
    for n in range(64)
]


@pytest.fixture
def stories(farm: Farm, shared_dir: Path) -> str:
    """Name of a quarter-million-parameter Llama in the farm's model store."""
    folder = shared_dir / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("no stories260K beside this checkout")
    store = ModelStore(farm.settings.resolved_models_dir())
    import_model(store, folder, "stories260K")
    return "stories260K"


async def queue(
    farm: Farm, model: str, method: str = "supervised", more: Any = (), **ext: Any
) -> str:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    file = await farm.upload(data)
    training = DataFile(
        file_id=file.public_id,
        sha256=file.sha256,
        format="prompt_completion",
        rows=len(ROWS),
        size_bytes=len(data),
    )
    hyperparameters = {"n_epochs": 8, "batch_size": 4, "max_length": 128, **dict(more)}
    body = {
        "model": model,
        "training_file": file.public_id,
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        "ext": ext,
    }
    spec: TrainingSpec = resolve(parse_request(body), training=training, seed=7).spec
    return await farm.queue(spec, file, gpus=spec.compute.gpus)


async def losses(farm: Farm, job: str) -> dict[int, float]:
    row = await farm.job(job)
    async with farm.db.session() as session:
        points = {step: values async for step, values in metrics.rows(session, row.id)}
    return {step: values["train_loss"] for step, values in points.items() if "train_loss" in values}


def leader(farm: Farm) -> int:
    """The process that leads the trainer's session: its launcher."""
    return next(pid for pid in farm.trainers() if pid == os.getsid(pid))


def rank(farm: Farm) -> int:
    """The process below it that trains."""
    return next(pid for pid in farm.trainers() if pid != os.getsid(pid))


def are_gone(farm: Farm, pids: set[int]) -> bool:
    return pids.isdisjoint(farm.trainers())


async def saved_by(farm: Farm, job: str, attempt: int) -> list[int]:
    """Steps of the checkpoints that one attempt published."""
    return [row.step for row in await farm.checkpoints(job) if row.attempt == attempt]


async def test_a_killed_workers_job_ends_as_if_nothing_had_happened(
    farm: Farm, stories: str
) -> None:
    first = await farm.worker("first", **STOCK)
    whole = await queue(farm, stories, checkpoints={"every_steps": 20})
    await farm.reaches(whole, "succeeded", within_s=90)
    job = await queue(farm, stories, checkpoints={"every_steps": 20})
    await until(lambda: farm.checkpoints(job), 60)
    first.signal(signal.SIGKILL)
    await until(lambda: not farm.trainers(), 2)
    assert (await farm.job(job)).state == "running"
    await farm.worker("second", **STOCK)
    row = await farm.reaches(job, "succeeded", within_s=90)
    assert row.attempt == 2
    assert row.resumed_from_step is not None
    expected, found = await losses(farm, whole), await losses(farm, job)
    assert set(found) == set(expected) == set(range(1, 129))
    assert found == pytest.approx(expected, abs=1e-6)
    await farm.oracle()


async def test_a_killed_trainers_job_goes_on_in_the_same_worker(farm: Farm, stories: str) -> None:
    worker = await farm.worker(**STOCK, TUNERY_RETRY_BACKOFF_S="0.1")
    (child,) = worker.children()
    whole = await queue(farm, stories, checkpoints={"every_steps": 20})
    await farm.reaches(whole, "succeeded", within_s=90)
    await until(lambda: not farm.trainers())
    job = await queue(farm, stories, checkpoints={"every_steps": 20})
    for attempt, victim in enumerate((rank, leader), start=1):
        await until(partial(saved_by, farm, job, attempt), 60)
        both = {leader(farm), rank(farm)}
        os.kill(victim(farm), signal.SIGKILL)
        await until(partial(are_gone, farm, both), 5)
    row = await farm.reaches(job, "succeeded", within_s=90)
    assert (row.attempt, row.worker, row.lost_count) == (3, "one", 0)
    assert worker.children() == [child]  # the supervisor lived through it
    assert row.resumed_from_step == max(await saved_by(farm, job, 2))
    codes = [event.data.get("code") for event in await farm.events(job) if event.level == "error"]
    assert codes == ["out_of_memory"] * 2  # for who else sends signal 9
    expected, found = await losses(farm, whole), await losses(farm, job)
    assert set(found) == set(expected) == set(range(1, 129))
    assert found == pytest.approx(expected, abs=1e-6)
    await farm.oracle()


async def test_a_warm_trainer_steps_soon_after_its_claim(farm: Farm, stories: str) -> None:
    worker = await farm.worker(**STOCK)
    await farm.reaches(await queue(farm, stories), "succeeded", within_s=90)
    job = await queue(farm, stories)
    await farm.steps(job, 1, within_s=90)
    assert worker.text().count('"warm": true') == 2
    row = await farm.reaches(job, "succeeded", within_s=90)
    async with farm.db.session() as session:
        points = await metrics.series(session, row.id, keys=["train_loss"], step_to=1)
    first_step = points["train_loss"][0].at
    assert row.started_at is not None
    took_s = (first_step - row.started_at).total_seconds()
    assert took_s < 6.0  # cold imports alone take longer


async def test_a_rank_killed_by_the_kernel_is_told_apart(farm: Farm, stories: str) -> None:
    await farm.worker(**STOCK, TUNERY_RETRY_BACKOFF_S="60")
    job = await queue(farm, stories)
    await farm.steps(job, 3, within_s=90)
    os.kill(rank(farm), signal.SIGKILL)
    killed = time.monotonic()
    row = await farm.reaches(job, "queued", "succeeded")
    assert row.state == "queued"
    assert time.monotonic() - killed < 5
    assert row.error_count == 1
    codes = [event.data.get("code") for event in await farm.events(job) if event.level == "error"]
    assert codes == ["out_of_memory"]
    await farm.wish("cancel", job)
    await farm.oracle()


async def test_a_worker_finds_the_teacher_too(farm: Farm, stories: str) -> None:
    await farm.worker(**STOCK)
    more = {"teacher_model": stories, "n_epochs": 1}
    job = await queue(farm, stories, "distillation", more)
    await farm.reaches(job, "succeeded", within_s=90)
    # Its own teacher: the untrained adapter changes nothing, and there is nothing to learn.
    assert (await losses(farm, job))[1] == pytest.approx(0, abs=1e-6)
    absent = await queue(farm, stories, "distillation", {**more, "teacher_model": "nobody"})
    row = await farm.reaches(absent, "failed", within_s=90)
    assert row.error is not None
    assert "nobody" in row.error["message"]


async def test_a_job_goes_on_from_an_earlier_ones_weights_and_optimizer(
    farm: Farm, stories: str
) -> None:
    await farm.worker(**STOCK)
    first = await queue(farm, stories)
    await farm.reaches(first, "succeeded", within_s=90)
    saved = max(await farm.checkpoints(first), key=lambda row: row.step)
    start = {"checkpoint": saved.public_id, "optimizer": True}
    second = await queue(farm, stories, init_from=start)
    row = await farm.reaches(second, "succeeded", within_s=90)
    before, after = await losses(farm, first), await losses(farm, second)
    assert after[1] < before[1] - 0.5
    went_on = max(await farm.checkpoints(second), key=lambda row: row.step)
    async with farm.db.begin() as session:
        await checkpoints.mark_resume_dropped(session, saved.id)
    third = await queue(farm, stories, init_from=start)
    row = await farm.reaches(third, "failed", within_s=90)
    assert row.error is not None
    assert row.error["param"] == "ext.init_from.optimizer"
    resumed = went_on.prefix + "/resume/state.json"
    state = json.loads(b"".join([part async for part in farm.store.get(resumed)]))
    assert state["earlier_updates"] == 128
