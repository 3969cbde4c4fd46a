"""Tells the record that this worker lives and what it offers, and learns whether it is to drain."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import random
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from core.artifacts.publish import NamelessFiles, sweep
from core.artifacts.stores import open_store
from core.db import workers
from core.db.engine import Database
from tunery.errors import TransientError
from tunery.models import ModelStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.settings import Settings
    from worker.devices import Device
    from worker.place import WorkerPlace
    from worker.warm import WarmPool

log = structlog.get_logger()

MOST_S = 10.0
"""Between two heartbeats of a worker, however long its jobs' leases are."""
SWEEP_S = 3600.0
PACKAGES = ("tunery", "torch", "transformers", "peft", "deepspeed", "celery")


def versions() -> dict[str, str]:
    """Of what decides a result, from package metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Herald:
    """A thread of the worker's main process. Starts after the pool has forked."""

    def __init__(
        self,
        settings: Settings,
        place: WorkerPlace,
        devices: Sequence[Device],
        queues: Sequence[str],
        warm: WarmPool,
    ) -> None:
        self._settings = settings
        self._place = place
        self._devices = devices
        self._queues = queues
        self._warm = warm
        self._sweep_at = time.monotonic() + random.uniform(0.1, 1.0) * SWEEP_S
        self._nameless = NamelessFiles()
        self._stopping = threading.Event()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="herald", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def leave(self) -> None:
        """A shutdown has begun: whatever the record says, supervisors drain from now on."""
        self._leaving.set()
        self._place.drain(True)

    def stop(self) -> None:
        """Take the worker's row away and end the thread."""
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._announce())

    async def _announce(self) -> None:
        db = Database(self._settings.database_url.get_secret_value(), pool_size=1)
        registered = False
        try:
            while not self._stopping.is_set():
                self._warm.ensure()
                try:
                    registered = await self._beat(db, registered)
                except TransientError as error:
                    log.warning("worker.beat_failed", why=str(error))
                await self._sweep(db)
                await asyncio.to_thread(self._stopping.wait, min(MOST_S, self._settings.beat_s))
            if registered:
                async with db.begin() as session:
                    await workers.remove(session, self._place.name)
        except TransientError as error:
            log.warning("worker.left_unsaid", why=str(error))
        finally:
            await db.close()

    async def _sweep(self, db: Database) -> None:
        """Once an hour, clear the store up. Several workers may: what is gone is gone."""
        if time.monotonic() < self._sweep_at:
            return
        self._sweep_at = time.monotonic() + SWEEP_S
        try:
            await sweep(db, open_store(self._settings), self._nameless)
        except TransientError as error:
            log.warning("store.sweep_failed", why=str(error))

    async def _beat(self, db: Database, registered: bool) -> bool:
        facts = self._facts()
        async with db.begin() as session:
            if registered:
                drain = await workers.heartbeat(
                    session, self._place.name, cached_models=facts["cached_models"]
                )
            else:
                await workers.upsert(session, name=self._place.name, **facts)
                drain = False
        if drain is None:  # somebody removed the row: say again who we are
            return False
        self._place.drain(drain or self._leaving.is_set())
        return True

    def _facts(self) -> dict[str, Any]:
        models = ModelStore(self._settings.resolved_models_dir(), self._settings.hub_allowed)
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "queues": list(self._queues),
            "devices": [device.as_json() for device in self._devices],
            "versions": versions(),
            "cached_models": [info.name for info in models.list()],
        }
