"""An attempt's record: what its trainer says and prints, written to the job every so often."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from core.db import claims, events, logs, metrics
from tunery.errors import TransientError
from worker.logs import LogBook
from worker.reporting import Note, Report

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from core.db.claims import Claim, Orders
    from tunery.training.protocol import DoneEvent, Event, FailureEvent
    from worker.failures import Failure
    from worker.hold import Hold
    from worker.reporting import Batch
    from worker.tools import Tools

REPORT_S = 1.0
"""Each report is a transaction. With a stream that looks twice a second, a step is seen in 2 s."""


class Record:
    """Gathers events and log lines, and writes them under the claim."""

    def __init__(self, tools: Tools, claim: Claim, hold: Hold, log: FilteringBoundLogger) -> None:
        self._db = tools.db
        self._lease_s = tools.settings.lease_s
        self._claim = claim
        self._hold = hold
        self._log = log
        self._report = Report()
        self._book = LogBook(tools.settings.max_log_bytes)
        self._recording = asyncio.Lock()
        self._prompt = asyncio.Event()  # there is something to report that cannot wait
        self.started = False
        """Whether it is on record that the trainer runs."""

    @property
    def done(self) -> DoneEvent | None:
        """The trainer's word that it has finished."""
        return self._report.done

    @property
    def failure(self) -> FailureEvent | None:
        """The trainer's own word on why it gave up."""
        return self._report.failure

    @property
    def stepping(self) -> bool:
        """Whether the first step is done."""
        return self._report.started

    def last_lines(self) -> str:
        """The end of what the trainer printed."""
        return self._book.last_lines()

    def take(self, event: Event) -> None:
        """Keep an event for the next report."""
        before = self._report.started
        self._report.add(event)
        if self._report.started and not before:  # people wait for the first step: tell it at once
            self.hurry()

    def feed(self, data: bytes) -> None:
        """Keep what the trainer printed for the next report."""
        self._book.feed(data)

    def hurry(self) -> None:
        """Report now rather than at the next turn."""
        self._prompt.set()

    async def report_regularly(self, ended: asyncio.Event) -> None:
        """Write every so often, until all has `ended`; a write that runs is finished."""
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._prompt.wait(), REPORT_S)
            self._prompt.clear()
            if ended.is_set():
                return
            text = self._book.take()
            if self._hold.fenced or not (text or self._report.waiting):
                continue
            await self._try_to_write(text)

    async def _try_to_write(self, text: str) -> None:
        """Write what was gathered; what cannot be written now is kept."""
        try:
            await self.write(text)
        except TransientError as error:
            self._log.warning("report.failed", why=str(error))

    async def write(self, text: str = "") -> None:
        """Write what was gathered, in one transaction that also renews the lease.

        Raises:
            ServiceUnavailable: it was not written, and is kept.
        """
        async with self._recording:
            batch = self._report.take()
            began = time.monotonic()
            try:
                orders = await self._write_batch(batch, text)
            except TransientError:
                self._report.give_back(batch)
                self._book.give_back(text)
                raise
        self.started = self.started or batch.started
        self._hold.step = batch.step
        self._hold.renewed(began, orders)

    async def _write_batch(self, batch: Batch, text: str) -> Orders | None:
        claim = self._claim
        async with self._db.begin() as session:
            # The beat locks the row: what follows is fenced by it.
            orders = await claims.beat(
                session, claim, ttl_s=self._lease_s, step=batch.step, progress=batch.progress
            )
            if orders is None:
                return None
            if batch.started and not self.started:
                await claims.move(session, claim, "starting", "running")
            await metrics.record(session, claim.job_id, claim.attempt, batch.points)
            for note in batch.notes:
                await events.append(
                    session,
                    claim.job_id,
                    attempt=claim.attempt,
                    kind=note.kind,
                    message=note.message,
                    level=note.level,
                    type=note.type,
                    data=note.data,
                )
            if text:
                await logs.append(session, claim.job_id, claim.attempt, text)
        return orders

    async def write_the_last(self, failure: Failure | None) -> None:
        """Write what is left, and the failure, for as long as the lease can still be ours."""
        text = self._book.finish()
        if failure is not None:  # said even when it is retried: the row forgets it then
            lines = self._book.last_lines()
            data = {"code": failure.code} | ({"log": lines} if lines else {})
            self._report.note(Note("warning", failure.message, level="error", data=data))
        if not (text or self._report.waiting):
            return
        give_up = self._hold.beat_at + self._lease_s
        while True:
            await self._try_to_write(text)
            if not self._report.waiting or time.monotonic() > give_up:
                return
            text = self._book.take()
            await asyncio.sleep(0.2)
