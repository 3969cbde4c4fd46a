"""The shape of every object, as committed: whoever changes it sees the difference in review.

Ids, times and hashes are replaced by what they are. `TUNERY_GOLDEN=write` rewrites the files.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from core.db import claims
from tests.api.test_jobs import JOBS, finished

if TYPE_CHECKING:
    import httpx2

    from tests.api.conftest import Worker

FOLDER = Path(__file__).parent / "golden"
ID = re.compile(r"\b(proj_|key_|file-|ftjob-|ftevent-|ftckpt_|wk_)[0-9A-Za-z]{24}\b")
HASH = re.compile(r"\b[0-9a-f]{64}\b")
TIMES = {
    "created_at", "finished_at", "created", "started_at", "heartbeat_at", "last_progress_at",
    "estimated_finish", "logged_at",
}  # fmt: skip
VARYING = {"gpu_seconds", "seed"}


def settled(value: Any, key: str = "") -> Any:
    """The value with what changes from run to run named by its kind."""
    if isinstance(value, dict):
        return {name: settled(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [settled(inner, key) for inner in value]
    if isinstance(value, str):
        told = HASH.sub("<sha256>", ID.sub(r"<\1>", value))
        return re.sub(r":[0-9A-Za-z]{24}\b", ":<job>", told)
    if key in TIMES and isinstance(value, int | float):
        return "<time>"
    if key in VARYING and value is not None:
        return f"<{key}>"
    return value


def check(name: str, value: Any) -> None:
    path = FOLDER / f"{name}.json"
    text = json.dumps(settled(value), indent=2) + "\n"
    if os.environ.get("TUNERY_GOLDEN") == "write":
        path.write_text(text)
    assert json.loads(text) == json.loads(path.read_text())


@pytest.fixture
def body(data_file: str, base_model: str) -> dict[str, Any]:
    return {"model": base_model, "training_file": data_file, "suffix": "s", "metadata": {"a": "b"}}


async def test_a_job_in_each_of_its_states(
    http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    async def shown(job: str) -> Any:
        return (await http.get(f"{JOBS}/{job}")).json()

    queued = (await http.post(JOBS, json=body)).json()
    check("job-queued", await shown(queued["id"]))
    claim = await worker.claim()
    async with worker.db.begin() as session:
        await claims.beat(
            session,
            claim,
            ttl_s=60.0,
            step=2,
            progress=claims.Progress(
                phase="training", total_steps=6, epoch=1.0, tokens_per_second=99.5,
                seconds_remaining=4.0, trained_tokens=64,
            ),
        )  # fmt: skip
    check("job-running", await shown(queued["id"]))
    error = {
        "code": "out_of_memory", "message": "no", "param": None, "category": "capacity",
        "retriable": False, "hint": None,
    }  # fmt: skip
    async with worker.db.begin() as session:
        await claims.fail(session, claim, error=error, retryable=False)
    check("job-failed", await shown(queued["id"]))
    done = (await http.post(JOBS, json=body)).json()
    model = await finished(worker)
    check("job-succeeded", await shown(done["id"]))
    check("model", (await http.get(f"/v1/models/{model}")).json())
    check("models", (await http.get("/v1/models")).json())
    check("checkpoints", (await http.get(f"{JOBS}/{done['id']}/checkpoints")).json())
    check("events", (await http.get(f"{JOBS}/{done['id']}/events")).json())
    files = await http.get(f"{JOBS}/{done['id']}/checkpoints/latest/files")
    check("checkpoint-files", files.json())
    check("metrics", (await http.get(f"{JOBS}/{done['id']}/metrics")).json())
    refused = await http.post(f"{JOBS}/{done['id']}/cancel")
    check("error-conflict", refused.json())


async def test_the_rest(http: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    check("dry-run", (await http.post(f"{JOBS}/dry_run", json=body | {"seed": 1})).json())
    check("quota", (await http.get("/v1/quota")).json())
    check("queue", (await http.get("/v1/queue")).json())
    unknown = {"method": {"type": "supervised", "supervised": {"adapter": {"rank": 4}}}}
    check("error-unknown-parameter", (await http.post(JOBS, json=body | unknown)).json())


def test_no_golden_object_has_an_empty_error() -> None:
    files = sorted(FOLDER.glob("*.json"))
    assert len(files) > 10
    for path in files:
        assert '"error": {}' not in path.read_text(), path.name
