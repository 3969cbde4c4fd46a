"""The lifeline with real processes."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from worker.lifeline import CHECKPOINT, CONTROL, KILL, RENEW, STOP, Descriptors, Order
from worker.warm import start_cold

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = str(Path(__file__).parent)
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": HERE, "LANG": "C.UTF-8"}


def gone(pid: int) -> bool:
    """No such process, or a zombie that only its parent's reaping is missing."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_gone(pid: int, within_s: float = 2.0) -> None:
    end = time.monotonic() + within_s
    while not gone(pid):
        assert time.monotonic() < end, f"process {pid} still lives"
        time.sleep(0.01)


@dataclass
class Line:
    """A lifeline started cold, seen from the supervisor's side."""

    process: subprocess.Popen[bytes]
    control: int
    status: Any
    events: Any
    log: Any
    hello: dict[str, int] = field(default_factory=dict)

    def send(self, letter: bytes, at: float | None = None) -> None:
        os.write(self.control, CONTROL.pack(letter, time.monotonic() if at is None else at))

    def end(self) -> dict[str, Any]:
        line = json.loads(self.status.readline())
        assert isinstance(line, dict)
        assert self.process.wait(5) == 0
        return line


@contextmanager
def lifeline(launcher: str, workdir: Path, deadman_s: float = 20.0) -> Iterator[Line]:
    order = Order(f"odd_launchers:{launcher}", str(workdir), deadman_s, environment=ENVIRONMENT)
    control, status, events, log = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    process = start_cold(order, Descriptors(control[0], status[1], events[1], log[1]))
    for fd in (control[0], status[1], events[1], log[1]):
        os.close(fd)
    readers = [os.fdopen(fd[0], "rb") for fd in (status, events, log)]
    line = Line(process, control[1], *readers)
    line.hello = json.loads(line.status.readline())
    try:
        yield line
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.close()
        try:
            os.close(line.control)
        except OSError:
            assert line.control == -1


def test_exit_code_events_and_log_arrive(tmp_path: Path) -> None:
    with lifeline("leave_with_7", tmp_path) as line:
        assert line.end() == {"exit": 7, "reason": "exited", "survivors": 0}
        assert line.events.read() == b"hello\n"
        assert line.log.read() == b"on the log\n"


def test_an_uncaught_error_is_printed_and_is_exit_1(tmp_path: Path) -> None:
    with lifeline("raise_an_error", tmp_path) as line:
        assert line.end()["exit"] == 1
        assert b"RuntimeError: no such luck" in line.log.read()


def test_stop_is_sigterm_and_checkpoint_is_sigusr1(tmp_path: Path) -> None:
    with lifeline("tell_signals", tmp_path) as line:
        line.events.readline()
        line.send(CHECKPOINT)
        time.sleep(0.1)
        line.send(STOP)
        assert line.end()["exit"] == 75
        assert line.events.read() == b"USR1 TERM"


def test_a_checkpoint_request_before_the_trainer_listens_does_not_kill_it(tmp_path: Path) -> None:
    with lifeline("leave_with_7", tmp_path) as line:
        line.send(CHECKPOINT)
        assert line.end()["exit"] == 7


def test_kill_takes_a_trainer_that_ignores_sigterm(tmp_path: Path) -> None:
    with lifeline("sleep_deaf", tmp_path) as line:
        line.events.readline()
        line.send(STOP)
        time.sleep(0.2)
        assert not gone(line.hello["trainer"])
        line.send(KILL)
        assert line.end() == {"exit": -9, "reason": "told", "survivors": 0}
        assert gone(line.hello["trainer"])


def test_a_closed_pipe_kills_everything_even_what_left_the_session(tmp_path: Path) -> None:
    with lifeline("scatter", tmp_path) as line:
        child, grandchild = map(int, line.events.readline().split())
        assert os.getsid(grandchild) == grandchild != os.getsid(child)
        began = time.monotonic()
        os.close(line.control)
        line.control = -1
        assert line.end()["reason"] == "closed"
        assert time.monotonic() - began < 1.0
        for pid in (line.hello["trainer"], child, grandchild):
            assert gone(pid)


def test_what_a_trainer_leaves_behind_is_killed(tmp_path: Path) -> None:
    with lifeline("scatter_and_leave", tmp_path) as line:
        child = int(line.events.readline())
        assert line.end() == {"exit": 0, "reason": "exited", "survivors": 0}
        assert gone(child)


def test_a_stopped_trainer_can_be_killed(tmp_path: Path) -> None:
    with lifeline("sleep", tmp_path) as line:
        line.events.readline()
        os.kill(line.hello["trainer"], signal.SIGSTOP)
        line.send(KILL)
        assert line.end()["exit"] == -9


def test_silence_kills_and_renewals_prevent_it(tmp_path: Path) -> None:
    with lifeline("sleep", tmp_path, deadman_s=0.6) as line:
        for _ in range(6):
            time.sleep(0.2)
            line.send(RENEW)
        assert not gone(line.hello["trainer"])
        renewed = time.monotonic()
        assert line.end()["reason"] == "deadman"
        assert 0.4 < time.monotonic() - renewed < 1.2


def test_a_renewal_counts_from_when_its_heartbeat_began(tmp_path: Path) -> None:
    with lifeline("sleep", tmp_path, deadman_s=0.8) as line:
        began = time.monotonic()
        time.sleep(0.5)
        line.send(RENEW, at=began)  # it took half a second to be confirmed
        line.send(RENEW, at=began - 100)  # and an older one takes nothing back
        assert line.end()["reason"] == "deadman"
        assert time.monotonic() - began < 1.2


def test_a_renewal_from_the_future_grants_no_more_than_one_from_now(tmp_path: Path) -> None:
    with lifeline("sleep", tmp_path, deadman_s=0.5) as line:
        line.send(RENEW, at=time.monotonic() + 3600)
        began = time.monotonic()
        assert line.end()["reason"] == "deadman"
        assert time.monotonic() - began < 1.0


def test_renewals_made_while_it_was_started_count(tmp_path: Path) -> None:
    """A pool that imports for longer than the dead-man's patience must not cost the trainer."""
    ends = [os.pipe() for _ in range(4)]
    control, status, events, log = ends
    order = Order(
        "odd_launchers:leave_with_7",
        str(tmp_path),
        5.0,
        renewed_at=time.monotonic() - 60,
        environment=ENVIRONMENT,
    )
    os.write(control[1], CONTROL.pack(RENEW, time.monotonic()))
    process = start_cold(order, Descriptors(control[0], status[1], events[1], log[1]))
    assert process.wait(10) == 0
    said = os.read(status[0], 1000).splitlines()
    assert json.loads(said[1]) == {"exit": 7, "reason": "exited", "survivors": 0}
    for pair in ends:
        for fd in pair:
            os.close(fd)


def test_an_order_that_is_too_old_is_not_carried_out(tmp_path: Path) -> None:
    with lifeline("sleep", tmp_path, deadman_s=0.0) as line:
        assert line.end()["reason"] == "deadman"


def test_the_trainer_dies_with_its_lifeline(tmp_path: Path) -> None:
    with lifeline("sleep", tmp_path) as line:
        line.events.readline()
        os.kill(line.hello["lifeline"], signal.SIGKILL)
        wait_gone(line.hello["trainer"])
        assert line.status.readline() == b""


def test_a_group_wide_sigterm_leaves_the_lifeline_to_see_the_trainer_out(tmp_path: Path) -> None:
    with lifeline("leave_with_7", tmp_path) as line:
        os.kill(line.hello["lifeline"], signal.SIGTERM)
        assert line.end()["exit"] == 7


def test_the_trainer_gets_its_descriptors_and_environment_and_no_more(tmp_path: Path) -> None:
    with lifeline("tell_surroundings", tmp_path) as line:
        line.end()
        fds, events, _, folder, environment = ast.literal_eval(line.events.read().decode())
    assert set(fds) == {0, 1, 2, events, 3}  # 3 is the listing's own
    assert folder == str(tmp_path)
    assert environment == ENVIRONMENT


SUPERVISOR = """
import os, sys, time
from worker.lifeline import CONTROL, RENEW, Descriptors, Order
from worker.warm import start_cold
workdir, launcher, deadman_s, path = sys.argv[1:]
control, status, events, log = os.pipe(), os.pipe(), os.pipe(), os.pipe()
environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path}
order = Order(launcher, workdir, float(deadman_s), environment=environment)
start_cold(order, Descriptors(control[0], status[1], events[1], log[1]))
for fd in (control[0], status[1], events[1], log[1]):
    os.close(fd)
print(os.read(status[0], 1000).decode().strip(), flush=True)
print(os.read(events[0], 1000).decode().strip(), flush=True)
while True:
    os.write(control[1], CONTROL.pack(RENEW, time.monotonic()))
    time.sleep(0.1)
"""


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_supervisor_takes_all_with_it(
    tmp_path: Path, fault: signal.Signals
) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path), "odd_launchers:scatter", "0.8", HERE],
        stdout=subprocess.PIPE,
    )
    assert supervisor.stdout is not None
    try:
        hello = json.loads(supervisor.stdout.readline())
        pids = [*map(int, supervisor.stdout.readline().split()), *hello.values()]
        time.sleep(1.0)  # longer than the dead-man's patience: renewals are what keeps it alive
        assert not any(map(gone, pids))
        supervisor.send_signal(fault)
        for pid in pids:
            wait_gone(pid, 2.0)
    finally:
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()
