"""One attempt at one job: from the claim to the row's next state.

While the trainer works, three loops run beside each other: the heartbeat (`Hold`), the report
(`Record`) and the publisher (`Publisher`). Every write shows the claim; the first that is refused
ends the attempt, and nothing is written after it. `Conclusion` lets go of the job.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import time
from typing import TYPE_CHECKING, TypeVar

import structlog
from pydantic import ValidationError

from core.artifacts.publish import Fenced
from core.jobs.naming import model_name
from tunery.errors import AppError
from tunery.spec import TrainingSpec
from tunery.training.protocol import EXIT_DONE, CheckpointEvent, read_event
from worker import failures
from worker.conclusion import Conclusion
from worker.environment import trainer_environment
from worker.failures import Ending, Failure
from worker.hold import Hold
from worker.lifeline import Order, Reason
from worker.prepare import Prepared, prepare
from worker.process import TrainerProcess
from worker.publisher import Publisher
from worker.record import Record

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from pathlib import Path
    from typing import Any

    from core.db.claims import Claim
    from worker.devices import Slot
    from worker.process import Exit
    from worker.tools import Tools

T = TypeVar("T")
WATCH_S = 0.25
"""Each look at the clocks takes a core from the trainer; a drain is heard that much later."""


class _Ended(Exception):
    """The attempt is to end before its trainer runs."""


class Attempt:
    """One claim, carried out.

    Args:
        claimed_at: `time.monotonic` when the claim was asked for: its lease is no younger.

    Raises:
        pydantic.ValidationError: the job's spec is not one of this version.
    """

    def __init__(
        self, tools: Tools, claim: Claim, slots: Sequence[Slot], claimed_at: float
    ) -> None:
        self._tools = tools
        self._settings = tools.settings
        self._claim = claim
        self._spec = TrainingSpec.model_validate(claim.spec)
        self._slots = slots
        self._log = structlog.get_logger().bind(job=claim.public_id, attempt=claim.attempt)
        self._hold = Hold(tools, claim, claimed_at, self._log)
        self._record = Record(tools, claim, self._hold, self._log)
        self._publisher: Publisher | None = None  # not before there is something to publish
        self._failure: Failure | None = None
        self._heard_at: float | None = None  # not before the trainer runs
        self._began = time.monotonic()
        self.survivors = 0
        """Processes of the trainer's that could not be killed: its devices are not free."""
        self._scratch = (
            tools.settings.resolved_scratch_dir()
            / f"{claim.public_id}-{claim.attempt}-{claim.owner[:8]}"
        )

    async def run(self) -> str | None:
        """Carry it out; returns the state that the job was left in, None when fenced."""
        self._log.info("attempt.claimed", gpus=self._claim.gpus, queue=self._claim.queue)
        lock = open_scratch(self._scratch)
        beat = asyncio.create_task(self._hold.beat_forever())
        try:
            end = await self._carry_out()
            state = await self._conclude(end)
        except Fenced:
            state = None
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
            await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)
            os.close(lock)
        self._log.info("attempt.ended", state=state or "fenced", ending=self._hold.ending)
        return state

    # The run ---------------------------------------------------------------------------------

    async def _carry_out(self) -> Exit | None:
        """Prepare and train. None: it did not come to a trainer."""
        try:
            prepared = await self._unless_ended(self._prepare())
            return await self._train(prepared)
        except _Ended:
            return None
        except Fenced:
            self._hold.end(Ending.FENCED)
            raise
        except AppError as error:
            self._failure = failures.of_error(error)
            return None
        except OSError as error:
            self._failure = self._no_room(error)
            return None

    def _no_room(self, error: OSError) -> Failure:
        """The failure that a full disk is; any other error is raised again."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        self._tools.disk_was_full()
        return failures.disk_full(self._settings.resolved_scratch_dir())

    async def _unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        watch = asyncio.create_task(self._watch())
        stop = asyncio.create_task(self._hold.ended.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        for other in (stop, watch):
            other.cancel()
        if self._hold.ending is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise _Ended
        return await task

    async def _prepare(self) -> Prepared:
        tools, cache = self._tools, self._settings.resolved_home() / "cache"
        return await prepare(tools.db, tools.store, tools.models, self._claim, self._scratch, cache)

    async def _train(self, prepared: Prepared) -> Exit:
        claim, inputs = self._claim, prepared.inputs
        model = model_name(claim.model, inputs.project, inputs.suffix, claim.public_id)
        self._publisher = publisher = Publisher(
            self._tools, claim, self._hold, self._record, self._spec, self._log, model
        )
        order = Order(
            self._settings.launcher,
            str(self._scratch),
            self._settings.deadman_s,
            self._hold.beat_at,
            self._environment(),
        )
        locks = [slot.fd for slot in self._slots]
        began = time.monotonic()
        made: list[TrainerProcess] = []

        def remember(process: TrainerProcess) -> None:
            made.append(process)
            self._hold.attach(process)  # heartbeats, and the end, reach it while it starts

        try:
            process = await self._unless_ended(
                TrainerProcess.start(order, warm=self._tools.warm, locks=locks, made=remember)
            )
            took_s = round(time.monotonic() - began, 3)
            self._log.info("trainer.started", warm=process.warm, took_s=took_s)
            self._heard_at = time.monotonic()
            return await self._attend(process, publisher)
        finally:
            self._hold.detach()
            for process in made:
                await process.close()

    def _environment(self) -> dict[str, str]:
        gpus = [slot.device.id for slot in self._slots if slot.device.kind == "cuda"]
        threads = self._settings.trainer_threads
        if threads is None:
            cores = len(os.sched_getaffinity(0))
            threads = max(1, cores // max(self._claim.gpus, self._tools.devices))
        return trainer_environment(os.environ, devices=gpus, threads=threads)

    async def _attend(self, process: TrainerProcess, publisher: Publisher) -> Exit:
        """Keep the trainer company until it and all that it said are dealt with."""
        reading = [
            asyncio.create_task(self._read_events(process, publisher)),
            asyncio.create_task(self._read_log(process)),
        ]
        publishing = asyncio.create_task(publisher.run())
        ended = asyncio.Event()
        watching = asyncio.create_task(self._watch())
        reporting = asyncio.create_task(self._record.report_regularly(ended))
        try:
            end = await process.wait()
            self._hold.detach()
            self.survivors = end.survivors
            # Nobody is left to write to the pipes: both end.
            await asyncio.gather(*reading)
            self._record.hurry()  # its last words do not wait for the store
            publisher.close()
            await self._settled(publishing)
            ended.set()
            self._record.hurry()
            await reporting  # not cancelled: what it has taken would be lost
        finally:
            tasks = (*reading, watching, reporting, publishing)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._log.info("trainer.ended", code=end.code, reason=end.reason, survivors=end.survivors)
        return end

    async def _settled(self, publishing: asyncio.Task[None]) -> None:
        """Wait until all is published, or until nothing may be any more."""
        while not publishing.done():
            if self._hold.ending in (Ending.FENCED, Ending.CANCEL):
                return
            await asyncio.wait({publishing}, timeout=WATCH_S)
        publishing.result()

    async def _read_events(self, process: TrainerProcess, publisher: Publisher) -> None:
        while True:
            try:
                line = await process.events.readline()
            except ValueError:  # longer than any event of ours
                self._log.warning("event.too_long")
                continue
            if not line:
                return
            self._heard_at = time.monotonic()
            try:
                event = read_event(line)
            except ValidationError as error:
                self._log.warning("event.invalid", problems=error.error_count())
                continue
            if event.run != self._claim.public_id:
                self._log.warning("event.of_another_run", run=event.run)
            elif isinstance(event, CheckpointEvent):
                publisher.announce(event)
            else:
                self._record.take(event)
                if self._record.stepping:  # nobody waits for any one event now
                    process.relax()

    async def _read_log(self, process: TrainerProcess) -> None:
        while data := await process.log.read(1 << 16):
            self._record.feed(data)

    async def _watch(self) -> None:
        """Look at the clocks."""
        limit_s: float | None = self._spec.limits.max_runtime_s
        if limit_s is not None:  # over all attempts
            limit_s = max(0.0, limit_s - self._claim.gpu_seconds / max(1, self._claim.gpus))
        while True:
            now = time.monotonic()
            if self._tools.draining():
                self._hold.end(Ending.DRAIN)
            if limit_s is not None and now - self._began > limit_s:
                self._hold.end(Ending.TIME_LIMIT)
            if self._hold.has_trainer:
                if self._silence_s(now) > self._settings.no_progress_s:
                    self._hold.end(Ending.NO_PROGRESS)
                self._hold.insist(now)
            await asyncio.sleep(WATCH_S)

    def _silence_s(self, now: float) -> float:
        return 0.0 if self._heard_at is None else now - self._heard_at

    # The end ---------------------------------------------------------------------------------

    async def _conclude(self, end: Exit | None) -> str | None:
        """Write the last of the record and let go of the job."""
        if self._hold.fenced:
            return None
        failure = self._failure_of(end)
        if self._hold.ending is not Ending.CANCEL:
            await self._record.write_the_last(failure)
        if self._hold.fenced:
            return None
        conclusion = Conclusion(self._tools, self._claim, self._hold, self._record, self._log)
        if failure is not None:
            return await conclusion.fail(failure)
        if (final := self._final(end)) is None or self._publisher is None:
            return await conclusion.give_back()
        try:
            return await conclusion.finish(final, self._publisher.model, self._scratch)
        except OSError as error:
            return await conclusion.fail(self._no_room(error))

    def _final(self, end: Exit | None) -> int | None:
        """Row id of the last checkpoint of a run that is complete; None: it is not."""
        done = end is not None and end.code == EXIT_DONE and self._record.done is not None
        if not done or self._publisher is None or self._hold.ending is Ending.CANCEL:
            return None
        return self._publisher.final

    def _failure_of(self, end: Exit | None) -> Failure | None:
        """What went wrong; None: nothing, or nothing that counts against the job."""
        if self._hold.ending is Ending.CANCEL or self._final(end) is not None:
            return None
        if self._record.failure is not None:
            return failures.of_event(self._record.failure)
        if self._failure is not None:
            return self._failure
        if self._publisher is not None and self._publisher.failure is not None:
            return self._publisher.failure
        if self._hold.ending is Ending.NO_PROGRESS:
            return failures.no_progress(self._silence_s(time.monotonic()))
        if self._hold.ending is Ending.TIME_LIMIT:
            return failures.time_limit(self._spec.limits.max_runtime_s or 0)
        if self._hold.ending is not None or end is None:
            return None
        if end.reason is Reason.DEADMAN:  # the database was away: nobody's fault
            return None
        return failures.of_exit(end, self._record.last_lines())


def open_scratch(folder: Path) -> int:
    """Make an attempt's folder and hold its lock, which says that it is in use."""
    folder.mkdir(parents=True, mode=0o700)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def sweep_scratch(root: Path) -> list[str]:
    """Remove folders that killed supervisors left; returns their names."""
    removed = []
    for folder in root.iterdir() if root.is_dir() else ():
        try:
            fd = os.open(folder / ".lock", os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
            continue  # being made, or not ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
        finally:
            os.close(fd)
    return removed
