from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tunery.client import Tunery
from worker.local.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.db, pytest.mark.slow]

LOCAL = [sys.executable, "-m", "worker.local"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    # Longer than a socket's path may be: the servers have to cope.
    return tmp_path / ("deep-" * 20)


@pytest.fixture
def running(home: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process = subprocess.Popen(
        [*LOCAL, "up", "--json", "--port", "0", "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the service did not start"
    yield process, json.loads(line)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def _pids(home: Path) -> dict[str, int]:
    note = Place(home).read()
    assert note is not None
    return {part["name"]: part["pid"] for part in note["parts"]}


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _until(seconds: float, condition: Any) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_service_comes_up_heals_and_leaves_nothing_behind(
    home: Path, running: tuple[subprocess.Popen[str], dict[str, Any]]
) -> None:
    process, facts = running
    key = (home / "first-key").read_text().strip()
    with Tunery(key, facts["url"]) as client:
        assert list(client.jobs.list()) == []
        assert client.version()["version"]
        second = subprocess.run(
            [*LOCAL, "up", "--home", str(home)], capture_output=True, text=True, check=False
        )
        assert second.returncode == 6
        assert facts["url"] in second.stderr

        before = _pids(home)
        assert set(before) == {"postgres", "broker", "api", "worker"}
        os.kill(before["api"], signal.SIGKILL)
        _until(30, lambda: _pids(home)["api"] not in (None, before["api"]))
        _until(
            30,
            lambda: (
                subprocess.run(
                    [*LOCAL, "status", "--home", str(home)], capture_output=True, check=False
                ).returncode
                == 0
            ),
        )
        assert list(client.jobs.list()) == []

    last = _pids(home)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert all(_gone(pid) for pid in last.values())
    assert not Place(home).is_running()
    assert Place(home).read() is None


def test_a_killed_supervisor_takes_its_servers_with_it(
    home: Path, running: tuple[subprocess.Popen[str], dict[str, Any]]
) -> None:
    process, _ = running
    left = _pids(home)
    process.kill()
    process.wait()
    _until(45, lambda: all(_gone(pid) for pid in left.values()))
