"""The warm pool with real processes."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from worker.lifeline import CONTROL, KILL, Descriptors, Order
from worker.warm import WarmPool, start_warm

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = str(Path(__file__).parent)
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[WarmPool]:
    pool = WarmPool(tmp_path / "warm.sock", ["odd_launchers"], ENVIRONMENT)
    pool.ensure()
    yield pool
    pool.stop()


class Run:
    """One request to the pool, answered."""

    def __init__(self, path: Path, launcher: str, workdir: Path) -> None:
        control, status, events, log = os.pipe(), os.pipe(), os.pipe(), os.pipe()
        wanted = Order(f"odd_launchers:{launcher}", str(workdir), 20.0, environment=ENVIRONMENT)
        ends = Descriptors(control[0], status[1], events[1], log[1])
        self.taken = False
        end = time.monotonic() + 5
        while not self.taken and time.monotonic() < end:  # the server may not listen yet
            self.taken = start_warm(path, wanted, ends)
            time.sleep(0 if self.taken else 0.01)
        for fd in ends.all():
            os.close(fd)
        self.control = control[1]
        self.status, self.events, self.log = (
            os.fdopen(fd[0], "rb") for fd in (status, events, log)
        )

    def line(self) -> dict[str, Any]:
        answer = json.loads(self.status.readline())
        assert isinstance(answer, dict)
        return answer

    def close(self) -> None:
        os.close(self.control)
        for reader in (self.status, self.events, self.log):
            reader.close()


def test_a_lifeline_and_its_trainer_come_from_the_server(pool: WarmPool, tmp_path: Path) -> None:
    run = Run(tmp_path / "warm.sock", "leave_with_7", tmp_path)
    hello = run.line()
    assert run.line() == {"exit": 7, "reason": "exited", "survivors": 0}
    assert run.events.read() == b"hello\n"
    assert run.log.read() == b"on the log\n"
    assert hello["lifeline"] != pool.pid
    run.close()


def test_the_server_survives_a_trainer_that_is_killed(pool: WarmPool, tmp_path: Path) -> None:
    before = pool.pid
    for _ in range(3):
        run = Run(tmp_path / "warm.sock", "sleep", tmp_path)
        trainer = run.line()["trainer"]
        run.events.readline()
        os.kill(trainer, signal.SIGKILL)
        assert run.line()["exit"] == -9
        run.close()
    pool.ensure()
    assert pool.pid == before


def test_a_dead_server_is_started_again_and_its_trainers_live_on(
    pool: WarmPool, tmp_path: Path
) -> None:
    run = Run(tmp_path / "warm.sock", "sleep", tmp_path)
    run.line()
    run.events.readline()
    before = pool.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    time.sleep(0.1)
    assert pool.pid is None
    pool.ensure()
    assert pool.pid not in (None, before)
    os.write(run.control, CONTROL.pack(KILL, 0.0))
    assert run.line() == {"exit": -9, "reason": "told", "survivors": 0}
    run.close()
    again = Run(tmp_path / "warm.sock", "leave_with_7", tmp_path)
    again.line()
    assert again.line()["exit"] == 7
    again.close()


def test_without_a_server_the_request_is_refused_at_once(tmp_path: Path) -> None:
    pipe = os.pipe()
    order = Order("odd_launchers:sleep", str(tmp_path), 1.0, environment=ENVIRONMENT)
    assert not start_warm(tmp_path / "nobody.sock", order, Descriptors(*[pipe[0]] * 4))
    for fd in pipe:
        os.close(fd)


def test_a_garbled_request_costs_only_its_sender(pool: WarmPool, tmp_path: Path) -> None:
    import socket

    Run(tmp_path / "warm.sock", "leave_with_7", tmp_path).close()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "warm.sock"))
        connection.sendall(b"\0not json")
    run = Run(tmp_path / "warm.sock", "leave_with_7", tmp_path)
    run.line()
    assert run.line()["exit"] == 7
    run.close()


def test_the_server_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom worker.warm import WarmPool\n"
        "pool = WarmPool(Path(sys.argv[1]), [], {})\npool.ensure()\nprint(pool.pid, flush=True)\n"
        "time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s.sock")], stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    with owner.stdout:
        server = int(owner.stdout.readline())
    while not (tmp_path / "s.sock").exists():
        time.sleep(0.01)
    owner.kill()
    owner.wait()
    end = time.monotonic() + 2
    while Path(f"/proc/{server}").exists():  # re-parented, so reaped by init
        state = Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_trainer_is_as_bare_as_one_started_cold(pool: WarmPool, tmp_path: Path) -> None:
    run = Run(tmp_path / "warm.sock", "tell_surroundings", tmp_path)
    trainer = run.line()["trainer"]
    run.line()
    fds, events, tasks, folder, environment = ast.literal_eval(run.events.read().decode())
    assert set(fds) == {0, 1, 2, events, 3}  # 3 is the listing's own
    assert (tasks, folder, environment) == (1, str(tmp_path), ENVIRONMENT)
    assert trainer
    run.close()


@pytest.mark.slow
def test_torch_preloaded_is_warm_threadless_and_sound_after_the_fork(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "HOME": str(tmp_path)}
    path = tmp_path / "warm.sock"
    pool = WarmPool(path, ["torch", "transformers", "peft", "odd_launchers"], environment)
    pool.ensure()
    try:
        first = Run(path, "tell_surroundings", tmp_path)
        first.line()
        first.line()
        tasks = ast.literal_eval(first.events.read().decode())[2]
        assert tasks == len(list(Path(f"/proc/{pool.pid}/task").iterdir())) == 1
        first.close()
        began = time.monotonic()
        second = Run(path, "add_in_parallel", tmp_path)
        second.line()
        assert time.monotonic() - began < 0.5
        assert second.line()["exit"] == 0
        total, import_s = ast.literal_eval(second.events.read().decode())
        assert total == 512.0**3
        assert import_s < 0.01
        second.close()
    finally:
        pool.stop()
