"""One attempt at one job: from the claim to the row's next state.

Three loops run beside each other while the trainer works: the heartbeat (lease, orders), the
report (events and log to the record), and the publisher (checkpoints to the store). Every write
shows the claim; the first that is refused ends the attempt, and nothing is written after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog
from pydantic import ValidationError

from core.artifacts.publish import (
    Fenced,
    drop_old_resumes,
    metrics_csv,
    publish_checkpoint,
    put_once,
)
from core.db import attempts, claims, events, logs, metrics
from core.ids import FILE, new_id
from core.jobs.naming import checkpoint_name, model_name
from tunery.errors import AppError, NotFound, TransientError
from tunery.spec import TrainingSpec
from tunery.training.protocol import EXIT_DONE, CheckpointEvent, read_event
from worker import failures
from worker.environment import trainer_environment
from worker.failures import Ending, Failure
from worker.lifeline import Order, Reason
from worker.logs import LogBook
from worker.prepare import Prepared, patiently, prepare
from worker.process import TrainerProcess
from worker.reporting import Batch, Note, Report

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from datetime import datetime
    from pathlib import Path
    from typing import Any

    from core.artifacts.stores import ArtifactStore
    from core.db.claims import Claim, Orders
    from core.db.engine import Database
    from core.settings import Settings
    from tunery.models import ModelStore
    from tunery.training.protocol import Event
    from worker.devices import Slot
    from worker.process import Exit

T = TypeVar("T")

REPORT_S = 1.0
"""Each report is a transaction. With a stream that looks twice a second, a step is seen in 2 s."""
WATCH_S = 0.1
STOP_AGAIN_S = 1.0
MAX_BACKOFF_S = 600.0


@dataclass(frozen=True)
class Tools:
    """What every attempt of this supervisor works with."""

    settings: Settings
    db: Database
    beats: Database
    """A connection that nothing else uses, with a short statement timeout."""
    store: ArtifactStore
    models: ModelStore
    warm: Path | None
    """Socket of the warm pool."""
    devices: int
    """How many this worker has: they share its cores."""
    draining: Callable[[], bool]
    disk_was_full: Callable[[], None]
    """Told when an attempt finds no room, so that the next one goes elsewhere."""


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
        self._report = Report()
        self._book = LogBook(tools.settings.max_log_bytes)
        self._process: TrainerProcess | None = None
        self._ending: Ending | None = None
        self._end_now = asyncio.Event()
        self._kill_at: float | None = None
        self._stop_again_at = 0.0
        self._failure: Failure | None = None
        self._started = False
        self._step = 0  # as written; a beat alone must not run ahead of the state
        self._recording = asyncio.Lock()
        self._prompt = asyncio.Event()  # there is something to report that cannot wait
        self._checkpoint_asked: datetime | None = None
        self._beat_at = claimed_at
        self._heard_at: float | None = None  # not before the trainer runs
        self._began = time.monotonic()
        self.survivors = 0
        """Processes of the trainer's that could not be killed: its devices are not free."""
        self._pending: asyncio.Queue[CheckpointEvent | None] = asyncio.Queue()
        self._final: int | None = None
        self._model = ""
        self._scratch = (
            tools.settings.resolved_scratch_dir()
            / f"{claim.public_id}-{claim.attempt}-{claim.owner[:8]}"
        )

    async def run(self) -> str | None:
        """Carry it out; returns the state that the job was left in, None when fenced."""
        self._log.info("attempt.claimed", gpus=self._claim.gpus, queue=self._claim.queue)
        lock = open_scratch(self._scratch)
        beat = asyncio.create_task(self._beat_forever())
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
        self._log.info("attempt.ended", state=state or "fenced", ending=self._ending)
        return state

    # Heartbeat -------------------------------------------------------------------------------

    async def _beat_forever(self) -> None:
        while self._ending is not Ending.FENCED:
            due = self._beat_at + self._settings.beat_s
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
        async with self._tools.beats.begin() as session:
            orders = await claims.beat(
                session, self._claim, ttl_s=self._settings.lease_s, step=self._step
            )
        self._renewed(began, orders)

    def _renewed(self, began: float, orders: Orders | None) -> None:
        """A beat begun at `began` was answered."""
        if orders is None:
            self._end(Ending.FENCED)
            return
        self._beat_at = max(self._beat_at, began)
        if self._process is not None:
            self._process.renew(began)
        if orders.cancel:
            self._end(Ending.CANCEL)
        elif orders.pause:
            self._end(Ending.PAUSE)
        elif self._process is not None and orders.checkpoint != self._checkpoint_asked:
            self._checkpoint_asked = orders.checkpoint
            if orders.checkpoint is not None:
                self._process.checkpoint()

    def _end(self, why: Ending) -> None:
        """End the attempt, gently or at once. A harder reason overrides a softer one."""
        harder = self._ending is not None and why.at_once and not self._ending.at_once
        if self._ending is not None and not harder and why is not Ending.FENCED:
            return
        if why is self._ending:
            return
        self._log.info("attempt.ending", why=why)
        self._ending = why
        self._end_now.set()
        self._obey()

    def _obey(self) -> None:
        """Pass the ending on to the trainer, when there is one."""
        if self._process is None or self._ending is None:
            return
        if self._ending.at_once:
            self._process.kill()
        else:
            self._process.stop()
            self._stop_again_at = time.monotonic() + STOP_AGAIN_S
            self._kill_at = time.monotonic() + self._settings.stop_grace_s

    # The run ---------------------------------------------------------------------------------

    async def _carry_out(self) -> Exit | None:
        """Prepare and train. None: it did not come to a trainer."""
        try:
            prepared = await self._unless_ended(self._prepare())
            end = await self._train(prepared)
        except _Ended:
            return None
        except Fenced:
            self._end(Ending.FENCED)
            raise
        except AppError as error:
            self._failure = failures.of_error(error)
            return None
        except OSError as error:
            self._failure = self._no_room(error)
            return None
        return end

    def _no_room(self, error: OSError) -> Failure:
        """The failure that a full disk is; any other error is raised again."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        self._tools.disk_was_full()
        return failures.disk_full(self._settings.resolved_scratch_dir())

    async def _unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        watch = asyncio.create_task(self._watch())
        stop = asyncio.create_task(self._end_now.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        for other in (stop, watch):
            other.cancel()
        if self._ending is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise _Ended
        return await task

    async def _prepare(self) -> Prepared:
        tools = self._tools
        cache = self._settings.resolved_home() / "cache"
        return await prepare(tools.db, tools.store, tools.models, self._claim, self._scratch, cache)

    async def _train(self, prepared: Prepared) -> Exit:
        claim, inputs = self._claim, prepared.inputs
        self._model = model_name(claim.model, inputs.project, inputs.suffix, claim.public_id)
        order = Order(
            self._settings.launcher,
            str(self._scratch),
            self._settings.deadman_s,
            self._beat_at,
            self._environment(),
        )
        locks = [slot.fd for slot in self._slots]
        began = time.monotonic()
        made: list[TrainerProcess] = []

        def remember(process: TrainerProcess) -> None:
            made.append(process)
            self._process = process  # heartbeats, and the end, reach it while it starts

        try:
            process = await self._unless_ended(
                TrainerProcess.start(order, warm=self._tools.warm, locks=locks, made=remember)
            )
            took_s = round(time.monotonic() - began, 3)
            self._log.info("trainer.started", warm=process.warm, took_s=took_s)
            self._heard_at = time.monotonic()
            return await self._attend(process)
        finally:
            self._process = None
            for process in made:
                await process.close()

    def _environment(self) -> dict[str, str]:
        gpus = [slot.device.id for slot in self._slots if slot.device.kind == "cuda"]
        threads = self._settings.trainer_threads
        if threads is None:
            cores = len(os.sched_getaffinity(0))
            threads = max(1, cores // max(self._claim.gpus, self._tools.devices))
        return trainer_environment(os.environ, devices=gpus, threads=threads)

    async def _attend(self, process: TrainerProcess) -> Exit:
        """Keep the trainer company until it and all that it said are dealt with."""
        reading = [
            asyncio.create_task(self._read_events(process)),
            asyncio.create_task(self._read_log(process)),
        ]
        publishing = asyncio.create_task(self._publish_all())
        ended = asyncio.Event()
        watching = asyncio.create_task(self._watch())
        reporting = asyncio.create_task(self._report_regularly(ended))
        try:
            end = await process.wait()
            self._process = None
            self.survivors = end.survivors
            # Nobody is left to write to the pipes: both end.
            await asyncio.gather(*reading)
            self._prompt.set()  # its last words do not wait for the store
            self._pending.put_nowait(None)
            await self._settled(publishing)
            ended.set()
            self._prompt.set()
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
            if self._ending in (Ending.FENCED, Ending.CANCEL):
                return
            await asyncio.wait({publishing}, timeout=WATCH_S)
        publishing.result()

    async def _read_events(self, process: TrainerProcess) -> None:
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
                self._pending.put_nowait(event)
            else:
                self._take(event)

    def _take(self, event: Event) -> None:
        before = self._report.started
        self._report.add(event)
        if self._report.started and not before:  # people wait for the first step: tell it at once
            self._prompt.set()

    async def _read_log(self, process: TrainerProcess) -> None:
        while data := await process.log.read(1 << 16):
            self._book.feed(data)

    async def _watch(self) -> None:
        """Look at the clocks."""
        limit_s: float | None = self._spec.limits.max_runtime_s
        if limit_s is not None:  # over all attempts
            limit_s = max(0.0, limit_s - self._claim.gpu_seconds / max(1, self._claim.gpus))
        while True:
            now = time.monotonic()
            if self._tools.draining():
                self._end(Ending.DRAIN)
            if limit_s is not None and now - self._began > limit_s:
                self._end(Ending.TIME_LIMIT)
            if self._process is not None:
                if self._silence_s(now) > self._settings.no_progress_s:
                    self._end(Ending.NO_PROGRESS)
                self._insist(self._process, now)
            await asyncio.sleep(WATCH_S)

    def _silence_s(self, now: float) -> float:
        return 0.0 if self._heard_at is None else now - self._heard_at

    def _insist(self, process: TrainerProcess, now: float) -> None:
        """Told to stop, it may not have listened yet: say it again, and kill it in the end."""
        if self._kill_at is None:
            return
        if now > self._kill_at:
            self._log.warning("trainer.ignores_stop")
            self._kill_at = None
            process.kill()
        elif now > self._stop_again_at:
            self._stop_again_at = now + STOP_AGAIN_S
            process.stop()

    # The record ------------------------------------------------------------------------------

    async def _report_regularly(self, ended: asyncio.Event) -> None:
        """Write every so often, until all has `ended`; a write that runs is finished."""
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._prompt.wait(), REPORT_S)
            self._prompt.clear()
            if ended.is_set():
                return
            text = self._book.take()
            if self._ending is Ending.FENCED or not (text or self._report.waiting):
                continue
            await self._write(text)

    async def _write(self, text: str) -> None:
        """Write what was gathered; what cannot be written now is kept."""
        try:
            await self._record(text)
        except TransientError as error:
            self._log.warning("report.failed", why=str(error))

    async def _record(self, text: str = "") -> None:
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
        self._started = self._started or batch.started
        self._step = batch.step
        self._renewed(began, orders)

    async def _write_batch(self, batch: Batch, text: str) -> Orders | None:
        claim = self._claim
        async with self._tools.db.begin() as session:
            # The beat locks the row: what follows is fenced by it.
            orders = await claims.beat(
                session,
                claim,
                ttl_s=self._settings.lease_s,
                step=batch.step,
                progress=batch.progress,
            )
            if orders is None:
                return None
            if batch.started and not self._started:
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

    # Checkpoints -----------------------------------------------------------------------------

    async def _publish_all(self) -> None:
        """Publish what is announced, in order, while training goes on."""
        while (event := await self._pending.get()) is not None:
            try:
                await self._publish(event)
            except Fenced:
                self._end(Ending.FENCED)
                return
            except AppError as error:
                self._log.error("checkpoint.failed", step=event.step, why=str(error))
                self._failure = failures.of_error(error)
                if self._process is not None:
                    self._process.kill()
                return

    async def _publish(self, event: CheckpointEvent) -> None:
        tools, claim = self._tools, self._claim
        began = time.monotonic()
        name = checkpoint_name(self._model, event.step)
        # A run that resumes here never says again what came before: that must be on record.
        await patiently(self._record)
        row = await patiently(
            lambda: publish_checkpoint(tools.db, tools.store, claim, event, name=name)
        )
        if event.final:
            self._final = row.id
        took_s = round(time.monotonic() - began, 3)
        self._log.info(
            "checkpoint.committed", step=event.step, size_bytes=row.size_bytes, took_s=took_s
        )
        await asyncio.to_thread(shutil.rmtree, event.path, ignore_errors=True)
        keep = self._spec.checkpoints.keep
        with contextlib.suppress(TransientError):  # the next checkpoint brings the next chance
            await drop_old_resumes(tools.db, tools.store, claim, keep)

    # The end ---------------------------------------------------------------------------------

    async def _conclude(self, end: Exit | None) -> str | None:
        """Write the last of the record and let go of the job."""
        if self._fenced:
            return None
        failure = self._failure_of(end)
        if self._ending is not Ending.CANCEL:
            await self._say_the_last(failure)
        if self._fenced:
            return None
        if failure is not None:
            return await self._fail(failure)
        if self._finished(end):
            return await self._finish()
        return await self._let_go(lambda session: claims.yield_(session, self._claim))

    @property
    def _fenced(self) -> bool:
        return self._ending is Ending.FENCED

    def _finished(self, end: Exit | None) -> bool:
        return (
            end is not None
            and end.code == EXIT_DONE
            and self._report.done is not None
            and self._final is not None
            and self._ending is not Ending.CANCEL
        )

    def _failure_of(self, end: Exit | None) -> Failure | None:
        """What went wrong; None: nothing, or nothing that counts against the job."""
        if self._ending is Ending.CANCEL or self._finished(end):
            return None
        if self._report.failure is not None:
            return failures.of_event(self._report.failure)
        if self._failure is not None:
            return self._failure
        if self._ending is Ending.NO_PROGRESS:
            return failures.no_progress(self._silence_s(time.monotonic()))
        if self._ending is Ending.TIME_LIMIT:
            return failures.time_limit(self._spec.limits.max_runtime_s or 0)
        if self._ending is not None or end is None:
            return None
        if end.reason is Reason.DEADMAN:  # the database was away: nobody's fault
            return None
        return failures.of_exit(end, self._book.last_lines())

    async def _say_the_last(self, failure: Failure | None) -> None:
        text = self._book.finish()
        if failure is not None:  # said even when it is retried: the row forgets it then
            lines = self._book.last_lines()
            data = {"code": failure.code} | ({"log": lines} if lines else {})
            self._report.note(Note("warning", failure.message, level="error", data=data))
        if not (text or self._report.waiting):
            return
        give_up = self._beat_at + self._settings.lease_s
        while True:
            await self._write(text)
            if not self._report.waiting or time.monotonic() > give_up:
                return
            text = self._book.take()
            await asyncio.sleep(0.2)

    async def _fail(self, failure: Failure) -> str | None:
        backoff_s = min(
            MAX_BACKOFF_S, self._settings.retry_backoff_s * 2 ** min(self._claim.attempt - 1, 16)
        )
        self._log.warning("attempt.failed", code=failure.code, why=failure.message)
        return await self._let_go(
            lambda session: claims.fail(
                session,
                self._claim,
                error=failure.as_json(),
                retryable=failure.retryable,
                backoff_s=backoff_s,
            )
        )

    async def _let_go(self, write: Callable[[Any], Awaitable[str | None]]) -> str | None:
        """Write the job's next state, for as long as the lease can still be ours."""

        async def once() -> str | None:
            async with self._tools.db.begin() as session:
                return await write(session)

        left_s = self._beat_at + self._settings.lease_s - time.monotonic()
        try:
            return await patiently(once, within_s=max(0.0, left_s))
        except TransientError as error:
            # Nothing was written, or it was and we do not know: the lease lapses by itself.
            self._log.warning("attempt.left_to_the_reaper", why=str(error))
            return None

    async def _finish(self) -> str | None:
        """running -> finishing -> succeeded, with the result file."""
        claim, tools = self._claim, self._tools

        async def finishing() -> None:
            async with tools.db.begin() as session:
                if not self._started:
                    await claims.move(session, claim, "starting", "running")
                moved = await claims.move(session, claim, "running", "finishing")
                if not moved and not await claims.holds(session, claim):
                    raise Fenced(f"attempt {claim.attempt} of {claim.public_id} is over")
            self._started = True

        try:
            await patiently(finishing)
            table = await patiently(lambda: metrics_csv(tools.db, claim.job_id))
            key, file_id = await self._put_result(table)
        except Fenced:
            return None
        except AppError as error:
            return await self._fail(failures.of_error(error))
        except OSError as error:
            return await self._fail(self._no_room(error))
        digest = hashlib.sha256(table).hexdigest()
        try:
            return await self._let_go(
                lambda session: self._commit(session, key, file_id, digest, len(table))
            )
        except _Ended:
            return await self._take_back(key, file_id)

    async def _take_back(self, key: str, file_id: str) -> str | None:
        """The commit was refused: a cancel came first, somebody else owns the job, or an earlier
        try did commit although its answer was lost."""
        tools = self._tools

        async def committed() -> bool:
            async with tools.db.session() as session:
                return await attempts.file_exists(session, file_id)

        with contextlib.suppress(TransientError, NotFound):
            if await patiently(committed, within_s=self._settings.lease_s):
                return "succeeded"
            await tools.store.delete(key)
        return await self._let_go(lambda session: claims.yield_(session, self._claim))

    async def _put_result(self, table: bytes) -> tuple[str, str]:
        file_id = new_id(FILE)
        key = f"files/{self._claim.project_id}/{file_id}"
        path = self._scratch / "metrics.csv"
        await asyncio.to_thread(path.write_bytes, table)
        await patiently(lambda: put_once(self._tools.store, key, path))
        return key, file_id

    async def _commit(
        self, session: Any, key: str, file_id: str, sha256: str, size_bytes: int
    ) -> str:
        assert self._final is not None
        done = self._report.done
        result = await attempts.add_result_file(
            session,
            self._claim,
            public_id=file_id,
            store_key=key,
            sha256=sha256,
            size_bytes=size_bytes,
        )
        finished = await claims.finish(
            session,
            self._claim,
            final_checkpoint_id=self._final,
            fine_tuned_model=self._model,
            result_file_id=result,
            trained_tokens=done.trained_tokens if done else None,
            peak_memory_bytes=done.peak_memory_bytes if done else None,
        )
        if not finished:
            raise _Ended  # rolls the file's row back
        return "succeeded"


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
