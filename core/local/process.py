"""Server processes that never outlive their owner.

`subprocess` alone leaves children behind when their parent is killed. On Linux the kernel signals
a child when its parent dies (`PR_SET_PDEATHSIG`), but "parent" there means the *thread* that
forked. So every spawn happens on one thread that lives as long as this process does.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import pwd
import queue
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import Conflict, ServiceUnavailable

if TYPE_CHECKING:
    import signal

_PR_SET_PDEATHSIG = 1
# Loaded here, not between fork and exec, where taking the loader's lock could hang.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Account:
    """A system user that a server runs as."""

    uid: int
    gid: int


def unprivileged() -> Account | None:
    """The account for servers that refuse to run as root; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise ServiceUnavailable(
        "running as root, and the system has neither a user postgres nor nobody",
        hint="run as an ordinary user, or point TUNERY_DATABASE_URL at a Postgres of your own",
    )


def can_enter(path: Path, account: Account) -> bool:
    """Whether `account` may pass through `path` and every folder above it."""
    for folder in (path, *path.parents):
        status = folder.stat()
        if status.st_uid == account.uid:
            needed = 0o100
        elif status.st_gid == account.gid:
            needed = 0o010
        else:
            needed = 0o001
        if not status.st_mode & needed:
            return False
    return True


class FolderLock:
    """One owner per folder, for as long as the owner lives: the kernel drops it at death."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "owner.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            Conflict: another process has it.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise Conflict(
                f"{self._path.parent} is in use by another process",
                code="already_running",
                hint="stop the other one, or choose another folder with TUNERY_HOME",
            ) from error
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the folder up; harmless when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _die_with_parent(parent: int, death_signal: signal.Signals) -> Callable[[], None]:
    def prepare() -> None:
        if _LIBC is None:
            return
        # After setuid (which clears it): subprocess changes the user before it calls us.
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return prepare


_Spawn = tuple[Callable[[], "subprocess.Popen[bytes]"], "Future[subprocess.Popen[bytes]]"]


class _Spawner:
    """The thread on which children are started; it never ends before the process does."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[_Spawn] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._owner: int | None = None

    def run(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with self._start:
            if self._owner != os.getpid():  # first use, or first use after a fork
                self._wanted = queue.SimpleQueue()
                threading.Thread(target=self._serve, name="spawner", daemon=True).start()
                self._owner = os.getpid()
        done: Future[subprocess.Popen[bytes]] = Future()
        self._wanted.put((start, done))
        return done.result()

    def _serve(self) -> None:
        while True:
            start, done = self._wanted.get()
            try:
                done.set_result(start())
            except BaseException as error:
                done.set_exception(error)


_SPAWNER = _Spawner()


def spawn(
    argv: Sequence[str | Path],
    *,
    log: Path,
    death_signal: signal.Signals,
    account: Account | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a server in its own session, writing to `log`, that gets `death_signal` if we die.

    A session of its own, so that Ctrl-C at the terminal reaches the owner alone, which then stops
    its servers in order.
    """
    identity: dict[str, Any] = {}
    if account is not None:
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                [str(part) for part in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
                env=environment,
                preexec_fn=_die_with_parent(os.getpid(), death_signal),
                **identity,
            )

    return _SPAWNER.run(start)


def stop(process: subprocess.Popen[bytes], *signals: tuple[signal.Signals, float]) -> None:
    """Send each signal in turn, waiting its seconds for the end; then kill."""
    for number, patience_s in signals:
        if process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        process.kill()
        process.wait()


def tail(log: Path, size_bytes: int = 2000) -> str:
    """The end of a server's log, for the message that says why it did not start."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - size_bytes))
        return stream.read().decode(errors="replace").strip()


def private_folder(folder: Path, account: Account | None = None) -> None:
    """Make `folder` for us (or `account`) alone.

    Raises:
        ServiceUnavailable: it is there and somebody else's, as anything under /tmp may be.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = os.geteuid() if account is None else account.uid
    status = folder.lstat()
    if status.st_uid not in (wanted, os.geteuid()) or not stat.S_ISDIR(status.st_mode):
        raise ServiceUnavailable(f"{folder} belongs to another user", hint="remove it")
    folder.chmod(0o700)
    if account is not None:
        os.chown(folder, account.uid, account.gid)


def socket_folder(folder: Path, name_length: int) -> Path:
    """`folder`, or a short stand-in under /tmp when a socket's path there would be too long.

    The kernel allows 107 bytes for the path of a unix socket.
    """
    if len(os.fsencode(folder)) + 1 + name_length <= 100:
        return folder
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return Path("/tmp") / f"tunery-{os.geteuid()}-{digest}"
