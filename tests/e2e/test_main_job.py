"""The main job, from a POST to a loaded adapter, and what may happen to it on the way.

Everything is real: Postgres, broker, API, worker, trainer, and the client that people have.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.launcher import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import openai
    from openai.types.fine_tuning import FineTuningJob

    from bench.service import ServiceUnderTest

    Until = Callable[..., FineTuningJob]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

STEPS = 120
LONG: dict[str, Any] = {
    "model": "tiny",
    "seed": 7,
    "method": {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3}
        },
    },
    "extra_body": {"ext": {"checkpoints": {"every_steps": 20}}},
}
LOAD = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello, my parcel 17 is missing, please help."},
     {"role": "assistant", "content": '{"topic": "parcel", "ticket": 17}'}],
    tokenize=False,
)
ids = tokenizer(text, return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(base)
with torch.no_grad():
    before = model(input_ids=ids, labels=ids).loss.item()
    tuned = PeftModel.from_pretrained(model, adapter)
    after = tuned(input_ids=ids, labels=ids).loss.item()
print(json.dumps({"before": before, "after": after}))
"""


def step_of(job: FineTuningJob) -> int:
    """Optimizer steps done."""
    extra = job.model_extra or {}
    return int(extra["ext"]["progress"]["step"])


def losses(service: ServiceUnderTest, job_id: str) -> dict[int, float]:
    """Training loss by step, all of them."""
    with service.client() as http:
        answer = http.get(f"/v1/fine_tuning/jobs/{job_id}/metrics?keys=train_loss&resolution=5000")
    points = answer.json()["data"]["train_loss"]
    return dict(zip(points["steps"], points["values"], strict=True))


@pytest.fixture(scope="module")
def start(client: openai.OpenAI, files: tuple[str, str]) -> Callable[[], FineTuningJob]:
    """Create one more of the same long job."""
    return lambda: client.fine_tuning.jobs.create(training_file=files[0], **LONG)


@pytest.fixture(scope="module")
def uninterrupted(
    service: ServiceUnderTest, start: Callable[[], FineTuningJob], until: Until
) -> dict[int, float]:
    """The loss curve of the long job when nothing happens to it."""
    job = until(start().id, lambda job: job.status == "succeeded")
    curve = losses(service, job.id)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < curve[1] - 0.5, "it did not learn: no curve to compare with"
    return curve


def test_the_stock_client_carries_a_job_from_a_file_to_a_loaded_adapter(
    service: ServiceUnderTest,
    client: openai.OpenAI,
    files: tuple[str, str],
    until: Until,
    tmp_path: Path,
) -> None:
    jobs = client.fine_tuning.jobs
    made = jobs.create(
        model="tiny",
        training_file=files[0],
        validation_file=files[1],
        suffix="support",
        seed=3,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}},
        },
        extra_body={
            "method": {
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate": 2e-3},
                    "adapter": {"type": "lora", "r": 8},
                },
            }
        },
    )
    assert made.status in ("validating_files", "queued")
    job = until(made.id, lambda job: job.status == "succeeded")
    assert job.fine_tuned_model
    assert "support" in job.fine_tuned_model
    assert job.trained_tokens
    assert job.id in [listed.id for listed in jobs.list(limit=10)]
    assert job.fine_tuned_model in [model.id for model in client.models.list()]

    events = list(jobs.list_events(job.id, limit=100))
    assert events[0].created_at >= events[-1].created_at
    assert any(event.type == "metrics" for event in events)

    rows = list(csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text)))
    # Step 0 is the base model on the validation file, before anything was learnt.
    assert [int(row["step"]) for row in rows] == list(range(25))
    assert float(rows[24]["train_loss"]) < float(rows[1]["train_loss"])
    assert float(rows[24]["valid_loss"]) < float(rows[0]["valid_loss"])

    checkpoint = next(iter(jobs.checkpoints.list(job.id)))
    assert checkpoint.step_number == 24
    assert checkpoint.metrics.valid_loss

    adapter = download(service, job.id, checkpoint.id, tmp_path)
    found = load(service, adapter)
    assert found["after"] < found["before"] - 0.2


def download(service: ServiceUnderTest, job_id: str, checkpoint_id: str, folder: Path) -> Path:
    """The adapter's archive, unpacked, each file held to the manifest."""
    with service.client() as http:
        path = f"/v1/fine_tuning/jobs/{job_id}"
        archive = http.get(f"{path}/adapter")
        manifest = http.get(f"{path}/checkpoints/{checkpoint_id}/files").json()["data"]
        single = http.get(f"{path}/checkpoints/{checkpoint_id}/files/adapter_model.safetensors")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        tar.extractall(folder, filter="data")
    (config,) = folder.rglob("adapter_config.json")
    adapter = config.parent
    for entry in manifest:
        content = (adapter / entry["path"]).read_bytes()
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert single.content == (adapter / "adapter_model.safetensors").read_bytes()
    return adapter


def load(service: ServiceUnderTest, adapter: Path) -> dict[str, float]:
    """Loss of a row under the base and under the adapter, in a process that knows PEFT alone."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(service.home / "models" / "tiny"), str(adapter)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_running_job_is_cancelled_at_its_next_step(
    client: openai.OpenAI, start: Callable[[], FineTuningJob], until: Until
) -> None:
    job = until(start().id, lambda job: job.status == "running" and step_of(job) > 0)
    began = time.monotonic()
    client.fine_tuning.jobs.cancel(job.id)
    cancelled = until(job.id, lambda job: job.status == "cancelled")
    assert time.monotonic() - began < 5
    assert step_of(cancelled) < STEPS
    assert cancelled.finished_at
    assert not cancelled.fine_tuned_model


def test_a_paused_job_goes_on_as_if_nothing_had_been(
    service: ServiceUnderTest,
    client: openai.OpenAI,
    start: Callable[[], FineTuningJob],
    until: Until,
    uninterrupted: dict[int, float],
) -> None:
    job = until(start().id, lambda job: job.status == "running" and step_of(job) > 0)
    client.fine_tuning.jobs.pause(job.id)
    paused = until(job.id, lambda job: job.status == "paused")
    at = step_of(paused)
    assert 0 < at < STEPS
    time.sleep(1)
    assert step_of(client.fine_tuning.jobs.retrieve(job.id)) == at
    client.fine_tuning.jobs.resume(job.id)
    until(job.id, lambda job: job.status == "succeeded")
    assert losses(service, job.id) == pytest.approx(uninterrupted, abs=1e-6)


def test_a_killed_worker_costs_time_and_nothing_else(
    service: ServiceUnderTest,
    start: Callable[[], FineTuningJob],
    until: Until,
    uninterrupted: dict[int, float],
) -> None:
    job = until(start().id, lambda job: step_of(job) > 40)
    assert service.worker.process is not None
    os.kill(service.worker.process.pid, signal.SIGKILL)
    service.worker.process.wait(10)
    service.worker.start()
    done = until(job.id, lambda job: job.status == "succeeded")
    attempt = (done.model_extra or {})["ext"]["attempt"]
    assert attempt["number"] == 2
    assert 0 < attempt["resumed_from_step"] < STEPS
    assert losses(service, job.id) == pytest.approx(uninterrupted, abs=1e-6)


def test_a_stream_that_breaks_goes_on_without_gap_or_repeat(
    service: ServiceUnderTest,
    client: openai.OpenAI,
    start: Callable[[], FineTuningJob],
) -> None:
    job = start()
    seen: list[str] = []
    breaks = 0
    while True:
        for event in stream(service, job.id, seen[-1] if seen else None):
            if event == "[DONE]":
                break
            seen.append(event)
            if len(seen) in (2, 5, 8) and breaks < 3:
                breaks += 1
                break
        if event == "[DONE]":
            break
    assert breaks == 3
    stored = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert seen == stored[::-1]


def stream(service: ServiceUnderTest, job_id: str, last: str | None) -> Iterator[str]:
    """Ids of the events that a stream sends, behind `last`, and at the end `[DONE]`."""
    headers = {"last-event-id": last} if last else {}
    with (
        service.client() as http,
        http.stream("GET", f"/v1/fine_tuning/jobs/{job_id}/events/stream", headers=headers) as told,
    ):
        assert told.status_code == 200
        for line in told.iter_lines():
            if line.startswith("id:"):
                yield line[3:].strip()
            elif line == "data: [DONE]":
                yield "[DONE]"


def test_metrics_are_to_be_seen_within_two_seconds_of_being_said(
    service: ServiceUnderTest, start: Callable[[], FineTuningJob]
) -> None:
    job = start()
    first_seen: dict[int, float] = {}
    deadline = time.monotonic() + 60
    with service.client() as http:
        while STEPS not in first_seen and time.monotonic() < deadline:
            path = f"/v1/fine_tuning/jobs/{job.id}/metrics?keys=train_loss&resolution=5000"
            points = http.get(path).json()["data"].get("train_loss", {"steps": []})
            for step in points["steps"]:
                first_seen.setdefault(step, time.time())
            time.sleep(0.05)
    (said,) = service.home.glob(f"{job.id}-*{SUFFIX}")
    spoken = [json.loads(line) for line in said.read_text().splitlines()]
    emitted = {each["step"]: each["at"] for each in spoken if each["kind"] == "metrics"}
    assert list(emitted) == list(range(1, STEPS + 1))
    delays = [first_seen[step] - at for step, at in emitted.items()]
    assert max(delays) < 2.0
    assert min(delays) > 0.0
