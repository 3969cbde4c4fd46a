from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tunery.training.control import SIGNALS, StopFlag

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    flag = StopFlag()
    flag.install()
    yield flag
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_ask_for_a_stop_or_a_checkpoint(stop: StopFlag) -> None:
    signal.raise_signal(signal.SIGUSR1)
    assert (stop.take_checkpoint(), stop.take_checkpoint(), stop.stop) == (True, False, False)
    signal.raise_signal(signal.SIGTERM)
    assert (stop.take_checkpoint(), stop.stop) == (False, True)


def test_what_the_parent_hears_after_a_fork_the_child_sees(stop: StopFlag) -> None:
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(told, 1)
        os._exit(stop.stop + 2 * stop.take_checkpoint())
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGUSR1)
    os.write(tell, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    os.close(told)
    os.close(tell)
