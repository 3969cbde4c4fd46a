"""Answers the questions of dry runs, beside whatever this worker trains.

One at a time, in a process of one thread and the lowest priority: a training run that shares the
cores hardly notices. The worker's pool has no part in it, which may be busy for hours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from core.artifacts import publish
from core.artifacts.stores import open_store
from core.db import inspections
from core.db.engine import Database
from core.jobs.inspection import nobody
from tunery.errors import AppError, TransientError
from tunery.models import ModelStore
from tunery.spec import TrainingSpec
from tunery.training.protocol import RunOrder
from worker.attempt import open_scratch
from worker.environment import warm_environment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from core.artifacts.stores import ArtifactStore
    from core.db.inspections import Question
    from core.settings import Settings
    from tunery.spec import DataFile

log = structlog.get_logger()

LOOK_S = 1.0
LOWEST_PRIORITY = 19
_PROGRAM = "tunery.training.inspection"


class Inspector:
    """A thread of the worker's main process. Starts after the pool has forked."""

    def __init__(self, settings: Settings, queues: Sequence[str]) -> None:
        self._settings = settings
        self._queues = list(queues)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inspector", daemon=True)

    def start(self) -> None:
        """Begin to answer; not where dry runs do not ask."""
        if self._settings.dry_run_wait_s:
            self._thread.start()

    def stop(self) -> None:
        """End the thread; a process that still reads is killed."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        db = Database(self._settings.database_url.get_secret_value(), pool_size=1)
        store = open_store(self._settings)
        try:
            while not self._stopping.is_set():
                try:
                    busy = await self._next(db, store)
                except TransientError as error:
                    busy = False
                    log.warning("inspector.failed", why=str(error))
                if not busy:
                    await asyncio.to_thread(self._stopping.wait, LOOK_S)
        finally:
            await db.close()

    async def _next(self, db: Database, store: ArtifactStore) -> bool:
        """Answer one question; False: there is none."""
        wait_s = self._settings.dry_run_wait_s
        async with db.begin() as session:
            question = await inspections.take(session, self._queues, wait_s)
        if question is None:
            return False
        try:
            said = await self._look(question, store)
        except (AppError, OSError, ValueError) as error:
            # The files or the base are not to be had here, the disk is full, or the spec is another
            # version's: as if nobody had been asked. The next question may fare better.
            log.warning("inspection.failed", question=question.id, why=type(error).__name__)
            said = nobody()
        async with db.begin() as session:
            await inspections.answer(session, question.id, said)
        return True

    async def _look(self, question: Question, store: ArtifactStore) -> dict[str, Any]:
        spec = TrainingSpec.model_validate(question.spec)
        models = ModelStore(self._settings.resolved_models_dir(), hub_allowed=False)
        base = await asyncio.to_thread(models.locate, spec.model.name, spec.model.revision)
        folder = self._settings.resolved_scratch_dir() / f"inspection-{question.id}-{os.getpid()}"
        lock = open_scratch(folder)  # what a killed worker leaves is swept by its successor
        try:
            data, held_out = spec.data, question.validation_key
            training = await _fetch(store, question.training_key, data.training, folder)
            validation = None
            if held_out is not None and data.validation is not None:
                validation = await _fetch(store, held_out, data.validation, folder)
            order = RunOrder(
                run="inspection",
                spec=spec,
                base_model_path=str(base),
                training_path=training,
                validation_path=validation,
            )
            path = folder / "order.json"
            path.write_text(order.model_dump_json(), encoding="utf-8")
            return await self._read(path)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            os.close(lock)

    async def _read(self, order: Path) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _PROGRAM,
            str(order),
            env=warm_environment(os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST_PRIORITY)
        reading = asyncio.create_task(process.communicate())
        give_up = time.monotonic() + inspections.TAKEN_FOR_S
        while not reading.done():
            if self._stopping.is_set() or time.monotonic() > give_up:
                process.kill()
            await asyncio.wait({reading}, timeout=LOOK_S)
        out, _ = reading.result()
        if process.returncode:
            log.warning("inspection.failed", code=process.returncode)
            return nobody()
        found: dict[str, Any] = json.loads(out)
        return found


async def _fetch(store: ArtifactStore, key: str, file: DataFile, folder: Path) -> str:
    """A data file on this machine.

    Raises:
        NotFound: it went meanwhile.
        StoreUnavailable: not now.
    """
    target = folder / f"{file.file_id}{file.suffix}"
    await publish.download(store, key, target)
    return str(target)
