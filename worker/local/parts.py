"""The parts of the embedded service, each started again when it dies."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from core.local.process import spawn, stop
from tunery.errors import AppError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = structlog.get_logger()

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 30.0
HEALTHY_S = 60.0
"""A part that lived this long starts again at once, as if it had never failed."""


class Server(Protocol):
    """What a part is: something that starts, can be watched, and stops."""

    process: subprocess.Popen[bytes] | None

    def start(self) -> object: ...

    def stop(self) -> None: ...


@dataclass
class Program:
    """A Python program of ours, writing to its log."""

    argv: Sequence[str]
    log: Path
    environment: dict[str, str]
    grace_s: float
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = spawn(
            self.argv,
            log=self.log,
            death_signal=signal.SIGTERM,
            environment=self.environment,
        )

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process, (signal.SIGTERM, self.grace_s))
            self.process = None


@dataclass
class Part:
    """A server under watch."""

    name: str
    server: Server
    clock: Callable[[], float] = time.monotonic
    restarts: int = 0
    started_at: float = 0.0
    due_at: float | None = None
    """When it is to be started again; None while it runs."""
    _backoff_s: float = field(default=FIRST_BACKOFF_S)

    def start(self) -> None:
        self.server.start()
        self.started_at = self.clock()
        self.due_at = None

    def stop(self) -> None:
        self.server.stop()

    @property
    def pid(self) -> int | None:
        return self.server.process.pid if self.server.process else None

    @property
    def state(self) -> str:
        return "running" if self.due_at is None else "restarting"

    def watch(self) -> bool:
        """Look once; True when something changed.

        A part found dead waits out its backoff, which doubles with each early death. One that
        cannot be started is dead again.
        """
        if self.due_at is None:
            return self._noticed_death()
        if self.clock() < self.due_at:
            return False
        self.restarts += 1
        try:
            self.start()
        except (OSError, AppError) as error:
            log.warning("part.start_failed", part=self.name, reason=str(error))
            self._schedule()
        return True

    def _noticed_death(self) -> bool:
        process = self.server.process
        if process is None or process.poll() is None:
            return False
        log.warning("part.died", part=self.name, exit_code=process.returncode)
        self.server.stop()  # a database's lock and socket are given up before it starts again
        if self.clock() - self.started_at >= HEALTHY_S:
            self._backoff_s = FIRST_BACKOFF_S
        self._schedule()
        return True

    def _schedule(self) -> None:
        self.due_at = self.clock() + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, LAST_BACKOFF_S)
