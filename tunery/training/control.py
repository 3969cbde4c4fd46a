"""What a run is told while it runs: stop, or write a checkpoint."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


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

    def install(self) -> None:
        """Listen to SIGTERM and SIGINT (stop) and SIGUSR1 (checkpoint); main thread only."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.request_stop()

        def checkpoint(number: int, frame: FrameType | None) -> None:
            self.request_checkpoint()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGUSR1, checkpoint)
