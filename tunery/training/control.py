"""What a run is told while it runs: stop, or write a checkpoint."""

from __future__ import annotations

import mmap
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STOP, _CHECKPOINT = 0, 1


class StopFlag:
    """Set from a signal handler or another thread, read at step boundaries.

    It lies in memory that processes forked from this one share, whenever they are forked: what a
    launcher hears, its ranks see, though a signal comes while one of them is being started.
    """

    def __init__(self) -> None:
        self._asked = mmap.mmap(-1, 2)

    @property
    def stop(self) -> bool:
        """Whether a stop was asked for."""
        return bool(self._asked[_STOP])

    def request_stop(self) -> None:
        """Stop at the next optimizer step, with a resume checkpoint."""
        self._asked[_STOP] = 1

    def request_checkpoint(self) -> None:
        """Write a checkpoint at the next optimizer step and go on."""
        self._asked[_CHECKPOINT] = 1

    def take_checkpoint(self) -> bool:
        """Whether one was asked for since the last call, of any process that shares this."""
        asked, self._asked[_CHECKPOINT] = self._asked[_CHECKPOINT], 0
        return bool(asked)

    def heed(self, number: int) -> None:
        """What a signal asks for: SIGTERM and SIGINT to stop, SIGUSR1 for a checkpoint."""
        if number == signal.SIGUSR1:
            self.request_checkpoint()
        else:
            self.request_stop()

    def install(self) -> None:
        """Listen to `SIGNALS`, here and in processes forked hereafter; main thread only."""

        def listen(number: int, frame: FrameType | None) -> None:
            self.heed(number)

        for number in SIGNALS:
            signal.signal(number, listen)
