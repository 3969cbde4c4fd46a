"""The supervisor: claims jobs for the devices that are free, and carries them out one by one.

Runs in a pool child, woken by a message that says only "there may be work". Has no torch, and so
no device of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from core.artifacts.stores import open_store
from core.db import claims
from core.db.engine import Database
from tunery.errors import TransientError
from tunery.models import ModelStore
from worker.attempt import Attempt
from worker.devices import memory_used, still_held
from worker.failures import Failure
from worker.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from core.db.claims import Claim
    from core.settings import Settings
    from worker.devices import Device, Slot, Slots
    from worker.place import WorkerPlace

log = structlog.get_logger()

GIVE_BACK_S = 30.0
_TURN_S = 0.02
_BEAT_TIMEOUT_S = 5.0


class Supervisor:
    """One pool child's worth of work.

    Args:
        queues: all that this worker serves, whichever rang: a long backlog on one of them must not
            keep its devices from a better job on another.
    """

    def __init__(
        self, settings: Settings, place: WorkerPlace, slots: Slots, queues: Sequence[str]
    ) -> None:
        self._queues = queues
        self._settings = settings
        self._place = place
        self._slots = slots
        self._told_to_stop = False

    def draining(self) -> bool:
        """Whether to give back what runs and take nothing new."""
        return self._told_to_stop or self._place.draining()

    async def serve(self) -> int:
        """Claim and run until nothing is runnable here; returns how many ran."""
        loop = asyncio.get_running_loop()
        # Sent by service managers to the whole control group.
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        url = self._settings.database_url.get_secret_value()
        timeout_s = min(_BEAT_TIMEOUT_S, self._settings.lease_s / 4)
        db = Database(url, pool_size=3)
        beats = Database(url, pool_size=1, statement_timeout_s=timeout_s, pool_timeout_s=timeout_s)
        try:
            return await self._serve(db, beats)
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            await db.close()
            await beats.close()

    def _stop(self) -> None:
        self._told_to_stop = True

    async def _serve(self, db: Database, beats: Database) -> int:
        settings = self._settings
        tools = Tools(
            settings,
            db,
            beats,
            open_store(settings),
            ModelStore(settings.resolved_models_dir(), settings.hub_allowed),
            self._place.warm_socket,
            len(self._slots.devices),
            self.draining,
            self._place.disk_was_full,
        )
        ran = 0
        while not self.draining() and self._place.has_room():
            try:
                taken = await self._claim(tools)
            except TransientError as error:
                # Whoever is back first rings again: the reconciler, every half minute.
                log.warning("claim.failed", why=str(error))
                return ran
            if taken is None:
                return ran
            await self._carry_out(tools, *taken)
            ran += 1
        return ran

    async def _claim(self, tools: Tools) -> tuple[Claim, list[Slot], float] | None:
        """Take free devices and the best job for them, and since when; None: either is lacking."""
        with contextlib.ExitStack() as stack:
            while not stack.enter_context(self._slots.taking()):
                stack.close()
                await asyncio.sleep(_TURN_S)
            free = self._slots.free()
            claim = None
            began = time.monotonic()
            try:
                if free:
                    claim = await self._claim_for(self._slots.capacity(free), tools)
            finally:
                wanted = min(claim.gpus, len(free)) if claim is not None else 0
                for slot in free[wanted:]:
                    slot.release()
        return None if claim is None else (claim, free[:wanted], began)

    async def _claim_for(self, capacity: int, tools: Tools) -> Claim | None:
        cached = [info.name for info in tools.models.list()]
        async with tools.db.begin() as session:
            return await claims.claim_next(
                session,
                queues=self._queues,
                gpus_free=capacity,
                worker=self._place.name,
                ttl_s=self._settings.lease_s,
                cached_models=cached,
            )

    async def _carry_out(
        self, tools: Tools, claim: Claim, slots: Sequence[Slot], claimed_at: float
    ) -> None:
        devices = [slot.device for slot in slots]
        before = asyncio.create_task(asyncio.to_thread(memory_used, devices))
        attempt: Attempt | None = None
        try:
            attempt = Attempt(tools, claim, slots, claimed_at)
            await attempt.run()
        except ValidationError as error:
            message = f"this worker cannot read the job's spec: {error.error_count()} problems"
            await self._fail(tools, claim, message, retryable=False)
        except Exception as error:  # the edge: one job's bug must not end the worker
            log.exception("attempt.crashed", job=claim.public_id, attempt=claim.attempt)
            message = f"the supervisor failed with {type(error).__name__}"
            await self._fail(tools, claim, message, retryable=True)
        finally:
            survivors = attempt.survivors if attempt is not None else 0
            if survivors or not await self._given_back(devices, await before):
                # Not free: the slots stay locked until this process ends.
                log.error("devices.quarantined", devices=[device.id for device in devices])
            else:
                for slot in slots:
                    slot.release()

    async def _given_back(self, devices: Sequence[Device], before: Mapping[str, int]) -> bool:
        """Whether the GPUs' memory came back: a process that holds it may be out of our sight."""
        give_up = asyncio.get_running_loop().time() + GIVE_BACK_S
        while held := still_held(before, await asyncio.to_thread(memory_used, devices)):
            if asyncio.get_running_loop().time() > give_up:
                log.error("devices.memory_held", devices=held)
                return False
            await asyncio.sleep(1.0)
        return True

    async def _fail(self, tools: Tools, claim: Claim, message: str, *, retryable: bool) -> None:
        error = Failure("internal_error", "platform", message, retryable).as_json()
        with contextlib.suppress(TransientError):  # then the lease lapses
            async with tools.db.begin() as session:
                await claims.fail(
                    session,
                    claim,
                    error=error,
                    retryable=retryable,
                    backoff_s=self._settings.retry_backoff_s,
                )
