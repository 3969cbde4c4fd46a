"""What lies where under the home folder, and what a running service says of itself.

home/                  0700
  owner.lock           held by the supervisor for as long as it lives
  run/service.json     address, pids, states: read by `status`, `down` and the command line
  first-key            0600: the API key made on the first start
  postgres/ broker/    the two servers' state
  logs/                api.log, worker.log
  artifacts/ models/   checkpoints and files; base models
"""

from __future__ import annotations

import json
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.local.process import FolderLock
from tunery.errors import Conflict

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Place:
    """One home folder."""

    home: Path

    @property
    def first_key(self) -> Path:
        return self.home / "first-key"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def note(self) -> Path:
        return self.home / "run" / "service.json"

    def create(self) -> None:
        """Make the folders, private to this user."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.logs, self.note.parent):
            folder.mkdir(exist_ok=True, mode=0o700)

    def lock(self) -> FolderLock:
        """Become the one supervisor of this home.

        Raises:
            Conflict: there is one already; the message says where it answers.
        """
        lock = FolderLock(self.home)
        try:
            lock.acquire()
        except Conflict as error:
            running = self.read() or {}
            where = f" at {running['url']} (pid {running['pid']})" if "url" in running else ""
            raise Conflict(
                f"Tunery already runs on {self.home}{where}",
                code="already_running",
                hint="use it as it is, stop it with `tunery down`, or name another --home",
            ) from error
        return lock

    def is_running(self) -> bool:
        """Whether a supervisor holds this home."""
        if not self.home.is_dir():
            return False
        lock = FolderLock(self.home)
        try:
            lock.acquire()
        except Conflict:
            return True
        lock.release()
        return False

    def read(self) -> dict[str, Any] | None:
        """The last note of a service; None when there is none."""
        try:
            note: dict[str, Any] = json.loads(self.note.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return note

    def write(self, note: dict[str, Any]) -> None:
        """Replace the note; readers see the old one or the new one."""
        write_private(self.note, json.dumps(note, indent=2) + "\n")

    def forget(self) -> None:
        """Remove the note: nothing runs any more."""
        self.note.unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, all of it or none."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(draft, path)


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET of `url` is answered with 200. No proxy stands before this machine itself."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False
