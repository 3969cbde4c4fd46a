"""An attempt's hold on its job: the heartbeat, the orders that it brings, and its ending."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from core.db import claims
from tunery.errors import TransientError
from worker.failures import Ending

if TYPE_CHECKING:
    from datetime import datetime

    from structlog.typing import FilteringBoundLogger

    from core.db.claims import Claim, Orders
    from worker.process import TrainerProcess
    from worker.tools import Tools

STOP_AGAIN_S = 1.0


class Hold:
    """A claim that is kept alive, and the trainer that lives as long as it does.

    Args:
        claimed_at: `time.monotonic` when the claim was asked for: its lease is no younger.
    """

    def __init__(
        self, tools: Tools, claim: Claim, claimed_at: float, log: FilteringBoundLogger
    ) -> None:
        self._settings = tools.settings
        self._beats = tools.beats
        self._claim = claim
        self._log = log
        self._process: TrainerProcess | None = None
        self._kill_at: float | None = None
        self._stop_again_at = 0.0
        self._checkpoint_asked: datetime | None = None
        self.beat_at = claimed_at
        """`time.monotonic` at the start of the last heartbeat that was answered."""
        self.ending: Ending | None = None
        self.ended = asyncio.Event()
        """Set with the first ending."""
        self.step = 0
        """As written; a beat alone must not run ahead of the state."""

    @property
    def fenced(self) -> bool:
        """Whether the job is somebody else's: nothing may be written any more."""
        return self.ending is Ending.FENCED

    @property
    def left_s(self) -> float:
        """How long the lease can still be ours without another heartbeat; 0: no longer."""
        return max(0.0, self.beat_at + self._settings.lease_s - time.monotonic())

    # The trainer -----------------------------------------------------------------------------

    def attach(self, process: TrainerProcess) -> None:
        """Heartbeats, and the end, reach this trainer from now on."""
        self._process = process

    def detach(self) -> None:
        """There is no trainer any more."""
        self._process = None

    @property
    def has_trainer(self) -> bool:
        return self._process is not None

    def kill_trainer(self) -> None:
        """Kill the trainer, when there is one; says nothing of the attempt's ending."""
        if self._process is not None:
            self._process.kill()

    # Heartbeat -------------------------------------------------------------------------------

    async def beat_forever(self) -> None:
        """Renew the lease until it is lost."""
        while not self.fenced:
            due = self.beat_at + self._settings.beat_s
            wait_s = due - time.monotonic()
            if wait_s > 0:  # the report's writes renew the lease as well
                await asyncio.sleep(min(wait_s, self._settings.beat_s))
                continue
            try:
                await self._beat()
            except TransientError as error:
                self._log.warning("beat.failed", why=str(error))
                await asyncio.sleep(min(1.0, self._settings.beat_s / 2))

    async def _beat(self) -> None:
        began = time.monotonic()
        async with self._beats.begin() as session:
            orders = await claims.beat(
                session, self._claim, ttl_s=self._settings.lease_s, step=self.step
            )
        self.renewed(began, orders)

    def renewed(self, began: float, orders: Orders | None) -> None:
        """A beat begun at `began` was answered; None: it is not our job any more."""
        if orders is None:
            self.end(Ending.FENCED)
            return
        self.beat_at = max(self.beat_at, began)
        if self._process is not None:
            self._process.renew(began)
        if orders.cancel:
            self.end(Ending.CANCEL)
        elif orders.pause:
            self.end(Ending.PAUSE)
        elif self._process is not None and orders.checkpoint != self._checkpoint_asked:
            self._checkpoint_asked = orders.checkpoint
            if orders.checkpoint is not None:
                self._process.checkpoint()

    # Ending ----------------------------------------------------------------------------------

    def end(self, why: Ending) -> None:
        """End the attempt, gently or at once. A harder reason overrides a softer one."""
        harder = self.ending is not None and why.at_once and not self.ending.at_once
        if self.ending is not None and not harder and why is not Ending.FENCED:
            return
        if why is self.ending:
            return
        self._log.info("attempt.ending", why=why)
        self.ending = why
        self.ended.set()
        self._obey()

    def _obey(self) -> None:
        """Pass the ending on to the trainer, when there is one."""
        if self._process is None or self.ending is None:
            return
        if self.ending.at_once:
            self._process.kill()
        else:
            self._process.stop()
            self._stop_again_at = time.monotonic() + STOP_AGAIN_S
            self._kill_at = time.monotonic() + self._settings.stop_grace_s

    def insist(self, now: float) -> None:
        """Told to stop, it may not have listened yet: say it again, and kill it in the end."""
        if self._process is None or self._kill_at is None:
            return
        if now > self._kill_at:
            self._log.warning("trainer.ignores_stop")
            self._kill_at = None
            self._process.kill()
        elif now > self._stop_again_at:
            self._stop_again_at = now + STOP_AGAIN_S
            self._process.stop()
