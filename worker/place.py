"""Where a worker's processes meet: its name, a private folder, and the sign that it drains."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.settings import Settings

FULL_S = 300.0
"""How long a worker takes no job after its disk was full: somebody may have made room by then."""


@dataclass(frozen=True)
class WorkerPlace:
    """Made by the worker's main process, known to its pool children."""

    name: str
    folder: Path
    """For this account alone; short, because it holds a socket."""

    @classmethod
    def make(cls, settings: Settings) -> WorkerPlace:
        name = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
        return cls(name, Path(tempfile.mkdtemp(prefix="tunery-worker-")))

    @property
    def warm_socket(self) -> Path:
        return self.folder / "warm.sock"

    @property
    def _flag(self) -> Path:
        return self.folder / "draining"

    def draining(self) -> bool:
        return self._flag.exists()

    def drain(self, wanted: bool) -> None:
        """Tell the supervisors to give back what they run, or that they may go on."""
        if wanted:
            self._flag.touch()
        else:
            self._flag.unlink(missing_ok=True)

    @property
    def _full(self) -> Path:
        return self.folder / "disk-full"

    def disk_was_full(self) -> None:
        """An attempt found no room: leave what is queued to other workers for a while."""
        self._full.touch()

    def has_room(self) -> bool:
        """Whether no attempt has found the disk full lately."""
        try:
            return time.time() - self._full.stat().st_mtime > FULL_S
        except FileNotFoundError:
            return True

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
