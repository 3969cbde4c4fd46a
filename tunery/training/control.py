"""What a run is told while it runs: stop, or write a checkpoint."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set from a signal handler or another thread, read at step boundaries."""

    def __init__(self) -> None:
        self.stop = False
        self.checkpoint = False

    def request_stop(self) -> None:
        """Stop at the next optimizer step, with a resume checkpoint."""
        self.stop = True

    def request_checkpoint(self) -> None:
        """Write a checkpoint at the next optimizer step and go on."""
        self.checkpoint = True

    def take_checkpoint(self) -> bool:
        """Whether one was asked for since the last call."""
        asked, self.checkpoint = self.checkpoint, False
        return asked

    def heed(self, number: int) -> None:
        """What a signal asks for: SIGTERM and SIGINT to stop, SIGUSR1 for a checkpoint."""
        if number == signal.SIGUSR1:
            self.request_checkpoint()
        else:
            self.request_stop()

    def install(self) -> None:
        """Listen to `SIGNALS`; main thread only."""

        def listen(number: int, frame: FrameType | None) -> None:
            self.heed(number)

        for number in SIGNALS:
            signal.signal(number, listen)
