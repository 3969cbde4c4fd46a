"""One run on this machine, without the service: what a worker does, minus the record.

<folder>/
  run.json  trainer.log        what was asked; what the trainer printed
  events.jsonl                 what it said
  metrics.csv                  the columns of the service's result file
  checkpoints/step-00000040/   as the service publishes them; `adapter` links the last export
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pydantic import ValidationError

from tunery.errors import Conflict, NotFound
from tunery.training import protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunery.training.protocol import Event, RunOrder

FIRST_COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
)
_RENAMED = {"train_mean_token_accuracy": "train_accuracy"}


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files lie."""

    path: Path

    @property
    def order(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def create(self) -> None:
        """Make the folder.

        Raises:
            Conflict: another run lies there.
        """
        if self.order.exists():
            raise Conflict(
                f"{self.path} holds a run already",
                code="already_exists",
                hint="--resume goes on with it, --out chooses another folder",
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def resume_point(self) -> Path:
        """The newest checkpoint to go on from.

        Raises:
            NotFound: there is none.
        """
        found = sorted((self.path / "checkpoints").glob("step-*/resume"))
        if not self.order.exists() or not found:
            raise NotFound(f"{self.path} holds no run that can go on")
        return found[-1]

    def point_to(self, checkpoint: Path) -> None:
        """Make `adapter` the export of this checkpoint."""
        draft = self.path / ".adapter"
        draft.unlink(missing_ok=True)
        draft.symlink_to(os.path.relpath(checkpoint / "export", self.path))
        draft.replace(self.adapter)


class Trainer:
    """The trainer process, in a session of its own: Ctrl-C reaches us, and we tell it."""

    def __init__(self, process: subprocess.Popen[bytes], events: TextIO) -> None:
        self._process, self._events = process, events

    def events(self) -> Iterator[Event]:
        """What it says, until it ends. A line that is no event is left to the log."""
        for line in self._events:
            try:
                yield protocol.read_event(line)
            except ValidationError:
                sys.stderr.write(line)

    def ask_to_stop(self) -> None:
        """Have it write a checkpoint at its next step and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End its whole group at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, one of the protocol's."""
        return self._process.wait()


@contextmanager
def started(folder: RunFolder, order: RunOrder) -> Iterator[Trainer]:
    """Start a trainer on an order; leaving the block ends it if it still lives."""
    folder.order.write_text(order.model_dump_json(indent=2), encoding="utf-8")
    reader, writer = os.pipe()
    argv = [sys.executable, "-m", "tunery.training.program", str(folder.path)]
    try:
        with (folder.path / "trainer.log").open("ab") as log:
            process = subprocess.Popen(
                [*argv, "--events-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                start_new_session=True,
            )
    finally:
        os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as events:
        trainer = Trainer(process, events)
        try:
            yield trainer
        finally:
            trainer.kill()
            trainer.wait()


class Record:
    """What the service keeps in its database, in two files."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._points: dict[int, dict[str, float]] = {}
        self._events = folder.path / "events.jsonl"
        if self._events.exists():  # a resumed run continues its curve
            for line in self._events.read_text(encoding="utf-8").splitlines():
                self._take(protocol.read_event(line))

    def add(self, event: Event) -> None:
        """Keep an event."""
        with self._events.open("a", encoding="utf-8") as stream:
            stream.write(event.model_dump_json() + "\n")
        self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, protocol.MetricsEvent):
            named = {_RENAMED.get(key, key): value for key, value in event.values.items()}
            self._points[event.step] = {"epoch": event.epoch, **named}

    def write_metrics(self) -> None:
        """Write all points, one line a step; what was not logged is empty."""
        own = sorted({key for row in self._points.values() for key in row} - set(FIRST_COLUMNS))
        with self._folder.metrics.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, [*FIRST_COLUMNS, *own], lineterminator="\n")
            writer.writeheader()
            for step, values in sorted(self._points.items()):
                writer.writerow({"step": step, **values})
