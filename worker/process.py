"""A trainer as the supervisor sees it: a few pipes, and a process id for the record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.errors import WorkerLost
from worker.lifeline import CHECKPOINT, CONTROL, KILL, RENEW, STOP, Descriptors, Order, Reason
from worker.warm import start_cold, start_warm

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from pathlib import Path

_COLD_WAIT_S = 30.0
_LINE_BYTES = 1 << 20
"""The longest event that is read."""
_PACE_S = 0.2
"""What a relaxed reader lets gather. A pipe holds 64 KiB, some 200 events; a trainer that fills it
waits as long."""


@dataclass(frozen=True)
class Exit:
    """How a trainer ended."""

    code: int | None
    """Its exit code, minus the signal's number when it was killed; None: not known."""
    reason: Reason | None
    """None: the lifeline itself is gone."""
    survivors: int = 0
    """Processes that SIGKILL did not end in ten seconds."""


class TrainerProcess:
    """A running lifeline with its trainer. Made by `start`; the maker closes it."""

    def __init__(
        self,
        control: int,
        status: asyncio.StreamReader,
        events: asyncio.StreamReader,
        log: asyncio.StreamReader,
        pipes: Sequence[_Pipe],
        child: subprocess.Popen[bytes] | None,
    ) -> None:
        self._control = control
        self._status = status
        self.events = events
        self.log = log
        self._pipes = pipes
        self._child = child
        self._closed = False
        self.trainer = 0
        self.lifeline = 0

    @property
    def warm(self) -> bool:
        """Whether it came from the warm pool."""
        return self._child is None

    @classmethod
    async def start(
        cls,
        order: Order,
        *,
        warm: Path | None,
        locks: Sequence[int] = (),
        warm_wait_s: float = 60.0,
        made: Callable[[TrainerProcess], None] = lambda process: None,
    ) -> TrainerProcess:
        """Start a lifeline: from the warm pool at the socket `warm`, or cold.

        Args:
            locks: descriptors that the lifeline holds open until the last process is gone.
            warm_wait_s: patience with a pool that is still importing; then it goes cold.
            made: told of the process before it runs. What is sent to it waits in its pipe, so
                that its dead-man hears of the heartbeats that were made while it was started.

        Raises:
            WorkerLost: this machine cannot start processes.
        """
        tries: list[tuple[Path | None, float]] = [(None, _COLD_WAIT_S)]
        if warm is not None:
            tries.insert(0, (warm, warm_wait_s))
        for path, wait_s in tries:
            process = await cls._start(order, locks, path)
            if process is None:
                continue
            try:
                made(process)
                if await process._greeted(wait_s):
                    return process
            except BaseException:
                await process.close()
                raise
            # Its end of the control pipe is closed: should it come late, it ends at once.
            await process.close()
        raise WorkerLost("the trainer's lifeline did not start")

    @classmethod
    async def _start(
        cls, order: Order, locks: Sequence[int], warm: Path | None
    ) -> TrainerProcess | None:
        pipes = [os.pipe() for _ in range(4)]
        control, *incoming = pipes
        theirs = Descriptors.of([control[0], *(pipe[1] for pipe in incoming), *locks])
        child = None
        try:
            if warm is None:
                child = start_cold(order, theirs)
            elif not await asyncio.to_thread(start_warm, warm, order, theirs):
                for pipe in (control[1], *(pipe[0] for pipe in incoming)):
                    os.close(pipe)
                return None
        finally:
            for fd in (control[0], *(pipe[1] for pipe in incoming)):
                os.close(fd)
        os.set_blocking(control[1], False)
        pipes_in = [await _Pipe.open(pipe[0]) for pipe in incoming]
        status, events, log = (pipe.stream for pipe in pipes_in)
        return cls(control[1], status, events, log, pipes_in, child)

    async def _greeted(self, within_s: float) -> bool:
        try:
            line = await asyncio.wait_for(self._status.readline(), within_s)
        except TimeoutError:
            return False
        if not line:
            return False
        hello = json.loads(line)
        self.lifeline, self.trainer = hello["lifeline"], hello["trainer"]
        return True

    def relax(self) -> None:
        """Hear of events and log lines in batches from now on, some five a second.

        Each wake-up of ours takes a core from one of the trainer's threads, and the others wait for
        that one.
        """
        for pipe in self._pipes[1:]:
            pipe.pace_s = _PACE_S

    def renew(self, began: float) -> None:
        """The heartbeat begun at `began` (`time.monotonic`) succeeded: live on."""
        self._send(RENEW, began)

    def stop(self) -> None:
        """Ask for a resume checkpoint and an exit (SIGTERM)."""
        self._send(STOP)

    def checkpoint(self) -> None:
        """Ask for a checkpoint (SIGUSR1)."""
        self._send(CHECKPOINT)

    def kill(self) -> None:
        """Kill the whole group now."""
        self._send(KILL)

    def _send(self, letter: bytes, at: float | None = None) -> None:
        if self._closed:  # its descriptor may be somebody else's by now
            return
        # Broken: it has ended, and `wait` says how. Full: it hangs, and the dead-man is not fed.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._control, CONTROL.pack(letter, time.monotonic() if at is None else at))

    async def wait(self) -> Exit:
        """Wait until the whole group is gone. Events and log stay readable to their end."""
        line = await self._status.readline()
        if line:
            said = json.loads(line)
            end = Exit(said["exit"], Reason(said["reason"]), said["survivors"])
        else:
            # Somebody killed the lifeline. The trainer's leader dies with it; ranks may not.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.trainer, signal.SIGKILL)
            end = Exit(None, None)
        return end

    async def close(self) -> None:
        """Let go of the pipes; a lifeline that still runs kills its trainer. May be repeated."""
        if self._closed:
            return
        os.close(self._control)
        self._closed = True
        for pipe in self._pipes:
            pipe.close()
        if self._child is not None:
            await asyncio.to_thread(self._child.wait)


class _Pipe(asyncio.StreamReaderProtocol):
    """The reading end of a pipe as a stream, which may be read no more often than `pace_s`."""

    def __init__(self) -> None:
        self.stream = asyncio.StreamReader(limit=_LINE_BYTES)
        super().__init__(self.stream)
        self.pace_s = 0.0

    @classmethod
    async def open(cls, fd: int) -> _Pipe:
        """Over a descriptor, which is closed with the pipe."""
        loop = asyncio.get_running_loop()
        _, pipe = await loop.connect_read_pipe(cls, os.fdopen(fd, "rb", buffering=0))
        return pipe

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.ReadTransport)
        self._pipe = transport

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.pace_s:
            self._pipe.pause_reading()
            asyncio.get_running_loop().call_later(self.pace_s, self._pipe.resume_reading)

    def close(self) -> None:
        """Let go of the descriptor."""
        self._pipe.close()
