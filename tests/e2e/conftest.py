"""One real service for all end-to-end tests, and the stock client to talk to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest

from bench import tiny
from bench.service import ServiceUnderTest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openai.types.fine_tuning import FineTuningJob

PATIENT_S = 60.0
QUICK = {
    "TUNERY_LEASE_S": "3",
    "TUNERY_BEAT_S": "0.5",
    "TUNERY_REAP_S": "0.3",
    "TUNERY_RELAY_S": "0.2",
    "TUNERY_RETRY_BACKOFF_S": "0.2",
    "TUNERY_STOP_GRACE_S": "15",
    "TUNERY_TRAINER_THREADS": "1",
    "TUNERY_LAUNCHER": "tests.e2e.launcher:launch",
    "PYTHONPATH": str(Path(__file__).parents[2]),  # where the launcher is found
}


@pytest.fixture(scope="session")
def service() -> Iterator[ServiceUnderTest]:
    """Postgres, broker, API and a worker with one CPU slot; a tiny model and two data files."""
    with ServiceUnderTest(worker=True, environment=QUICK) as running:
        tiny.add_tiny_model(running.home / "models")
        yield running


@pytest.fixture(scope="session")
def client(service: ServiceUnderTest) -> Iterator[openai.OpenAI]:
    """The client that people have, unmodified."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key) as made:
        yield made


@pytest.fixture(scope="session")
def files(client: openai.OpenAI) -> tuple[str, str]:
    """Ids of a training and a validation file."""
    made = []
    for name, rows, seed in (("train.jsonl", 64, 1), ("valid.jsonl", 8, 2)):
        content = tiny.jsonl(tiny.chats(rows, seed=seed))
        file = client.files.create(file=(name, content), purpose="fine-tune")
        file = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=30)
        assert file.status == "processed"
        made.append(file.id)
    return made[0], made[1]


@pytest.fixture(scope="session")
def until(client: openai.OpenAI) -> Callable[..., FineTuningJob]:
    """Poll a job until it is as wanted; fails at once when it has ended otherwise."""

    def poll(
        job_id: str, wanted: Callable[[FineTuningJob], bool], patience_s: float = PATIENT_S
    ) -> FineTuningJob:
        deadline = time.monotonic() + patience_s
        while True:
            job = client.fine_tuning.jobs.retrieve(job_id)
            if wanted(job):
                return job
            ended = job.status in ("succeeded", "failed", "cancelled")
            assert not ended, f"{job.status}: {job.error}"
            assert time.monotonic() < deadline, f"still {job.status}: {job.model_extra}"
            time.sleep(0.05)

    return poll
