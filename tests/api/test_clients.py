"""Three majors of the unmodified client carry on the whole conversation with a real service."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.db import claims
from core.db.tables import FileRow
from core.ids import new_id
from tests.api.conftest import BASE, CHAT, jsonl, once

if TYPE_CHECKING:
    from tests.api.conftest import Service, Worker

REPOSITORY = Path(__file__).parents[2]
RESULT = b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,2.5,,,\n"
OLDER = ("1.109.1", "2.26.0")


@pytest.fixture(scope="session")
def older_clients() -> Path:
    """Where the older clients are installed; installs them when they are not.

    Skips where no package index can be reached, unless CI says that it must not.
    """
    folder = REPOSITORY / ".cache"
    ran = subprocess.run(
        [REPOSITORY / "scripts" / "openai_clients", sys.executable],
        capture_output=True,
        text=True,
    )
    if ran.returncode != 0:
        if os.environ.get("CI"):
            pytest.fail(f"scripts/openai_clients failed: {ran.stderr[-2000:]}")
        pytest.skip("the older openai clients cannot be installed: no package index in reach")
    return folder


async def play(worker: Worker) -> None:
    """Be the worker for one job: wait for it, train it, publish its result."""
    for _ in range(600):
        if (claim := await worker.claim_or_none()) is not None:
            break
        await asyncio.sleep(0.1)
    assert claim is not None
    await worker.step(claim, 1, train_loss=2.5)
    await worker.save(claim, 1, train_loss=2.5)
    row = await worker.save(claim, 2, final=True, train_loss=2.0)
    public_id = new_id("file-")
    key = f"files/{claim.project_id}/{public_id}"
    size = await worker.store.put(key, once(RESULT))
    result = FileRow(
        public_id=public_id,
        project_id=claim.project_id,
        filename="metrics.csv",
        purpose="fine-tune-results",
        status="processed",
        size_bytes=size,
        sha256="0" * 64,
        store_key=key,
        content_type="text/csv",
    )
    async with worker.db.begin() as session:
        session.add(result)
    async with worker.db.begin() as session:
        assert await claims.move(session, claim, "running", "finishing")
        assert await claims.finish(
            session,
            claim,
            final_checkpoint_id=row.id,
            fine_tuned_model=claim.resolved["fine_tuned_model"],
            result_file_id=result.id,
            trained_tokens=10,
        )


async def talk(service: Service, worker: Worker, tmp_path: Path, packages: Path | None) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_bytes(jsonl(CHAT))
    key = await service.key(
        scopes=["files:read", "files:write", "jobs:read", "jobs:write", "artifacts:read"]
    )
    environment = {"PATH": os.environ["PATH"]}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    script = Path(__file__).with_name("conversation.py")
    playing = asyncio.create_task(play(worker))
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, script, service.url, key, BASE, data],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    await playing
    said = json.loads(ran.stdout)
    version = said.pop("version")
    assert version.startswith("3." if packages is None else packages.name.removeprefix("openai-"))
    events = said.pop("events")
    assert events[0] == "The job has successfully completed"
    assert events[-1].startswith("Created fine-tuning job: ftjob-")
    assert said == {
        "file": ["processed", "fine-tune"],
        "status": "succeeded",
        "error": None,
        "listed": True,
        "checkpoints": [2, 1],
        "result": RESULT.decode(),
        "moves": ["queued", "paused", "queued", "cancelled"],
        "models": ["base", "acme"],
        "base": BASE,
        "deleted": True,
        "refusals": [
            ["NotFoundError", "job_not_found", True],
            ["BadRequestError", "file_not_found", True],
            ["AuthenticationError", "invalid_api_key", True],
            ["PermissionDeniedError", "base_model_not_deletable", True],
        ],
        "files": 1,
        "file_deleted": True,
    }


async def test_the_current_client(service: Service, worker: Worker, tmp_path: Path) -> None:
    await talk(service, worker, tmp_path, None)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", OLDER)
async def test_the_older_clients(
    service: Service, worker: Worker, tmp_path: Path, older_clients: Path, version: str
) -> None:
    await talk(service, worker, tmp_path, older_clients / f"openai-{version}")
