from __future__ import annotations

import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tunery.errors import Conflict, ServiceUnavailable
from worker.local.__main__ import main
from worker.local.place import Place, answers, write_private
from worker.local.up import free_port

if TYPE_CHECKING:
    from pathlib import Path


def test_a_second_supervisor_is_told_where_the_first_answers(tmp_path: Path) -> None:
    place = Place(tmp_path / "home")
    place.create()
    lock = place.lock()
    place.write({"url": "http://127.0.0.1:8300", "pid": 4711, "parts": []})
    with pytest.raises(Conflict, match=r"already runs on .* at http://127.0.0.1:8300 \(pid 4711\)"):
        place.lock()
    assert place.is_running()
    lock.release()
    assert not place.is_running()


def test_a_second_up_says_so_and_exits_6(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path / "home")
    place.create()
    lock = place.lock()
    try:
        assert main(["up", "--home", str(place.home)]) == 6
    finally:
        lock.release()
    out, err = capsys.readouterr()
    assert out == ""
    assert "already runs" in err
    assert "tunery down" in err


def test_status_and_down_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--home", str(tmp_path)]) == 7
    assert main(["status", "--json", "--home", str(tmp_path)]) == 7
    assert main(["down", "--home", str(tmp_path)]) == 0
    assert capsys.readouterr().out == '{"running": false}\n'


def test_looking_for_a_service_loads_no_database_library(tmp_path: Path) -> None:
    code = (
        "import sys; from worker.local.__main__ import main\n"
        f"assert main(['down', '--home', {str(tmp_path)!r}]) == 0\n"
        "print(sorted({'sqlalchemy', 'psycopg', 'alembic', 'celery'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_home_and_key_are_private(tmp_path: Path) -> None:
    place = Place(tmp_path / "home")
    place.create()
    write_private(place.first_key, "secret\n")
    assert stat.S_IMODE(place.home.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.first_key.stat().st_mode) == 0o600
    assert [path.name for path in place.home.iterdir() if path.name.startswith(".")] == []


def test_a_taken_port_is_avoided_unless_it_was_asked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", None, port) != port
        with pytest.raises(ServiceUnavailable, match=str(port)):
            free_port("127.0.0.1", port, 8300)
        assert not answers(f"http://127.0.0.1:{port}/healthz", timeout_s=0.2)
    assert free_port("127.0.0.1", port, 8300) == port
