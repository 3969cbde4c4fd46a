"""The API as a process: started as in production, stopped with somebody listening."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import httpx2

from core.db import projects
from core.projects.keys import create_key
from tests.api.conftest import BASE, add_file
from tests.api.test_jobs import JOBS

if TYPE_CHECKING:
    from core.db.engine import Database
    from core.settings import Settings


async def test_told_to_stop_it_ends_open_streams_and_leaves_at_once(
    settings: Settings, db: Database, base_model: str
) -> None:
    async with db.begin() as session:
        project = await projects.insert_project(session, "acme", weight=1.0)
    assert project is not None
    _, key = await create_key(db, project, name="test")
    file = await add_file(db, project.id)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "uvicorn", "--factory", "api.app:app", "--port", "0",
        env=os.environ
        | {
            "TUNERY_HOME": str(settings.home),
            "TUNERY_DATABASE_URL": settings.database_url.get_secret_value(),
            "TUNERY_BROKER_URL": settings.broker_url.get_secret_value(),
            "TUNERY_HUB_ALLOWED": "false",
        },
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        url = ""
        while not url:
            line = (await process.stderr.readline()).decode()
            assert line, "the process died before it listened"
            url = line.partition("running on ")[2].split(" ")[0]
        async with httpx2.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30
        ) as http:
            made = await http.post(JOBS, json={"model": BASE, "training_file": file})
            path = f"{JOBS}/{made.json()['id']}/events/stream"
            lines: list[str] = []
            async with http.stream("GET", path) as response:
                async for line in response.aiter_lines():
                    if not lines:
                        process.send_signal(signal.SIGTERM)
                        told_at = time.monotonic()
                    lines.append(line)
        await asyncio.wait_for(process.wait(), 20)
        assert time.monotonic() - told_at < 10
        assert "data: [DONE]" not in lines, "the job has not ended, the listener must come back"
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
