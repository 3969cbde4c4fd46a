from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from worker.local.parts import Part, Program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _part(tmp_path: Path, code: str, clock: Clock) -> Part:
    program = Program([sys.executable, "-S", "-c", code], tmp_path / "log", {}, grace_s=5.0)
    return Part("test", program, clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def short_lived(tmp_path: Path, clock: Clock) -> Iterator[Part]:
    part = _part(tmp_path, "raise SystemExit(3)", clock)
    yield part
    part.stop()


def _die(part: Part) -> None:
    assert part.server.process is not None
    part.server.process.wait(10)


def test_a_dead_part_waits_twice_as_long_each_time(short_lived: Part, clock: Clock) -> None:
    waits = []
    short_lived.start()
    for _ in range(4):
        _die(short_lived)
        assert short_lived.watch()
        assert short_lived.due_at is not None
        waits.append(short_lived.due_at - clock.now)
        assert not short_lived.watch()  # not due yet
        clock.now = short_lived.due_at
        assert short_lived.watch()
    assert waits == [0.5, 1.0, 2.0, 4.0]
    assert short_lived.restarts == 4


def test_a_part_that_lived_long_starts_again_at_once(short_lived: Part, clock: Clock) -> None:
    short_lived.start()
    for lived_s in (0.0, 0.0, 60.0):
        _die(short_lived)
        clock.now += lived_s
        short_lived.watch()
        assert short_lived.due_at is not None
        wait = short_lived.due_at - clock.now
        clock.now = short_lived.due_at
        short_lived.watch()
    assert wait == 0.5


def test_a_program_that_cannot_start_is_tried_again(tmp_path: Path, clock: Clock) -> None:
    part = _part(tmp_path, "import time; time.sleep(60)", clock)
    part.start()
    assert part.server.process is not None
    part.server.process.kill()
    _die(part)
    part.watch()
    part.server.argv = [str(tmp_path / "absent")]  # type: ignore[attr-defined]
    assert part.due_at is not None
    clock.now = part.due_at
    assert part.watch()
    assert part.state == "restarting"
    assert part.due_at == clock.now + 1.0


def test_stopping_ends_the_process(tmp_path: Path, clock: Clock) -> None:
    part = _part(tmp_path, "import time; time.sleep(60)", clock)
    part.start()
    process = part.server.process
    assert process is not None
    assert not part.watch()
    part.stop()
    assert process.poll() is not None
    assert part.pid is None
