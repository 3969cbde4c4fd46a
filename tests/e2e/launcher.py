"""The stock launcher, with everything that the trainer says kept in a file as well.

Set as `TUNERY_LAUNCHER`: the service is none the wiser, and a test knows when a thing was said.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from tunery.training.launch import launch as stock

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".said.jsonl"


def launch(workdir: Path, events_fd: int) -> int:
    """Run the stock launcher; a child passes its events on and keeps a copy in the home folder."""
    reading, writing = os.pipe()
    copier = os.fork()
    if copier == 0:
        for number in (signal.SIGTERM, signal.SIGUSR1):  # meant for the trainer
            signal.signal(number, signal.SIG_IGN)
        os.close(writing)
        _copy(reading, events_fd, workdir.parents[1] / (workdir.name + SUFFIX))
        os._exit(0)
    os.close(reading)
    os.dup2(writing, events_fd)
    os.close(writing)
    code = stock(workdir, events_fd)
    os.close(events_fd)
    os.waitpid(copier, 0)
    return code


def _copy(reading: int, onward: int, path: Path) -> None:
    with os.fdopen(reading, "rb", buffering=0) as stream, path.open("ab", buffering=0) as kept:
        while part := stream.read(65536):
            os.write(onward, part)
            kept.write(part)
