"""An attempt's checkpoints on their way to the store, while training goes on."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from typing import TYPE_CHECKING

from core.artifacts.publish import Fenced, drop_old_resumes, publish_checkpoint
from core.jobs.naming import checkpoint_name
from tunery.errors import AppError, TransientError
from worker import failures
from worker.failures import Ending, Failure
from worker.prepare import patiently

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from core.db.claims import Claim
    from tunery.spec import TrainingSpec
    from tunery.training.protocol import CheckpointEvent
    from worker.hold import Hold
    from worker.record import Record
    from worker.tools import Tools


class Publisher:
    """Publishes what is announced, one after the other.

    Args:
        model: what the job's outcome is called; its checkpoints are named after it.
    """

    def __init__(
        self,
        tools: Tools,
        claim: Claim,
        hold: Hold,
        record: Record,
        spec: TrainingSpec,
        log: FilteringBoundLogger,
        model: str,
    ) -> None:
        self._tools = tools
        self._claim = claim
        self._hold = hold
        self._record = record
        self._log = log
        self._keep = spec.checkpoints.keep
        self._pending: asyncio.Queue[CheckpointEvent | None] = asyncio.Queue()
        self.model = model
        self.final: int | None = None
        """Row id of the checkpoint that the job ends with, once that is published."""
        self.failure: Failure | None = None
        """Why it gave up; the trainer was killed for it."""

    def announce(self, event: CheckpointEvent) -> None:
        """A checkpoint lies on the disk, complete."""
        self._pending.put_nowait(event)

    def close(self) -> None:
        """Nothing more will be announced."""
        self._pending.put_nowait(None)

    async def run(self) -> None:
        """Publish what is announced, in order, until closed, fenced or given up."""
        while (event := await self._pending.get()) is not None:
            try:
                await self._publish(event)
            except Fenced:
                self._hold.end(Ending.FENCED)
                return
            except AppError as error:
                self._log.error("checkpoint.failed", step=event.step, why=str(error))
                self.failure = failures.of_error(error)
                self._hold.kill_trainer()
                return

    async def _publish(self, event: CheckpointEvent) -> None:
        tools, claim = self._tools, self._claim
        began = time.monotonic()
        name = checkpoint_name(self.model, event.step)
        # A run that resumes here never says again what came before: that must be on record.
        await patiently(self._record.write)
        row = await patiently(
            lambda: publish_checkpoint(tools.db, tools.store, claim, event, name=name)
        )
        if event.final:
            self.final = row.id
        took_s = round(time.monotonic() - began, 3)
        self._log.info(
            "checkpoint.committed", step=event.step, size_bytes=row.size_bytes, took_s=took_s
        )
        await asyncio.to_thread(shutil.rmtree, event.path, ignore_errors=True)
        with contextlib.suppress(TransientError):  # the sweep deletes what is left
            await drop_old_resumes(tools.db, tools.store, claim, self._keep)
