"""The warm pool: a process that has imported what trainers need, and forks them.

Importing torch, transformers and peft takes seconds; forking a process that has done so takes tens
of milliseconds. The server is started by the worker's main process with the trainer's bare
environment (what a process was started with stays readable in /proc, so no secret may be in it),
runs one thread, never touches a device and forks one lifeline per request. It ends with the
worker's main process. Where it is not to be had, a lifeline is executed cold: slower, the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from worker.lifeline import Descriptors, Order, run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PRELOAD = ("torch", "transformers", "peft", "tunery.training.program", "tunery.training.launch")
"""What the stock launcher wants to find imported."""

_MAX_ORDER_BYTES = 256 * 1024
_MAX_FDS = 64


class WarmPool:
    """Starts the server, and starts it again when it has died."""

    def __init__(self, path: Path, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        """`path`: of the server's socket, in a folder that only we may enter."""
        self._path = path
        self._command = [sys.executable, "-m", "worker.warm", str(path), str(os.getpid()), *preload]
        self._environment = dict(environment)
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's, when it runs."""
        return self._server.pid if self._server and self._server.poll() is None else None

    def ensure(self) -> None:
        """Start the server unless it runs. Returns before it has imported anything."""
        if self.pid is not None:
            return
        # A session of its own: signals to the worker's group are not for it.
        self._server = subprocess.Popen(
            self._command, env=self._environment, start_new_session=True, stdin=subprocess.DEVNULL
        )

    def stop(self) -> None:
        """Kill the server. Lifelines that it forked live on."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self._path.unlink(missing_ok=True)


def start_warm(path: Path, order: Order, fds: Descriptors) -> bool:
    """Ask the server at `path` to fork a lifeline; False when there is no server.

    True means that the request is on its way. The lifeline's first status line says that it runs;
    if the server dies first, the status pipe closes.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            socket.send_fds(connection, [b"\0"], fds.all())
            connection.sendall(order.to_json().encode())
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            return False
    return True


def start_cold(order: Order, fds: Descriptors) -> subprocess.Popen[bytes]:
    """Execute a lifeline in a fresh interpreter. The caller reaps it."""
    numbers = ",".join(map(str, fds.all()))
    return subprocess.Popen(
        [sys.executable, "-m", "worker.lifeline", order.to_json(), numbers],
        env=order.environment,
        pass_fds=fds.all(),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )


def serve(path: Path, owner: int, preload: Sequence[str]) -> None:
    """Be the server, until the process `owner` ends."""
    watch = os.pidfd_open(owner)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    # Requests wait in the backlog while we import: as soon as the imports are done, they run.
    listener.listen(64)
    for name in preload:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the collector writes to every page that children share with us
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps lifelines for us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    poll.register(listener, select.POLLIN)
    while watch not in (ready := [fd for fd, _ in poll.poll()]):
        if listener.fileno() in ready:
            _accept(listener, watch)
    path.unlink(missing_ok=True)


def _accept(listener: socket.socket, watch: int) -> None:
    """Take one request and fork its lifeline. A bad request costs its sender alone."""
    connection, _ = listener.accept()
    connection.settimeout(1.0)
    fds: list[int] = []
    try:
        _, fds, _, _ = socket.recv_fds(connection, 1, _MAX_FDS)
        text = _read(connection)
    except OSError:
        text = b""
    finally:
        connection.close()
    if text and len(fds) >= 4:
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork() == 0:
            listener.close()
            os.close(watch)
            _be_lifeline(text, fds)
    for fd in fds:
        os.close(fd)


def _read(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(_MAX_ORDER_BYTES):
        parts.append(part)
    return b"".join(parts)


def _be_lifeline(text: bytes, fds: list[int]) -> None:
    code = 1
    try:
        run(Order.from_json(text), Descriptors.of(fds))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.warm")
    parser.add_argument("path", type=Path)
    parser.add_argument("owner", type=int)
    parser.add_argument("preload", nargs="*")
    given = parser.parse_args(arguments)
    with contextlib.suppress(ProcessLookupError):  # the worker went before we came
        serve(given.path, given.owner, given.preload)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
