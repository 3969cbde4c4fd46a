"""Run the whole service on one machine until told to stop.

Order of starting: Postgres, broker, schema, API, first key, worker; stopping goes the other way,
the worker first, so that its trainers write their checkpoints while there is a database to tell.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import structlog

from core.db import migrate
from core.db import projects as projects_table
from core.db.engine import Database
from core.local.broker import EmbeddedBroker
from core.local.postgres import EmbeddedPostgres
from core.local.process import tail
from core.projects.keys import SCOPES, KeyRing, create_key
from tunery.errors import ServiceUnavailable, Unauthenticated
from worker.local.parts import Part, Program
from worker.local.place import Place, answers, write_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from core.db.tables import ProjectRow
    from core.settings import Settings

log = structlog.get_logger()

API_PATIENCE_S = 60.0
API_GRACE_S = 10.0
WATCH_S = 0.25
PROJECT = "default"


class EmbeddedService:
    """Everything on one machine.

    Args:
        port: of the API; None means the settings' port, or any free one where that is taken.
        say: told each thing that is about to be waited for.
    """

    def __init__(
        self,
        settings: Settings,
        port: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._settings = settings
        self._place = Place(settings.resolved_home())
        self._wanted_port = port
        self._say = say
        self._parts: list[Part] = []
        self._stack = ExitStack()
        self.stopping = threading.Event()
        self.url = ""
        self.key = ""
        self._database_url = ""

    def start(self) -> None:
        """Bring everything up.

        Raises:
            Conflict: this home is in use.
            ServiceUnavailable: a part does not come up; the message ends with its log.
        """
        self._place.create()
        lock = self._place.lock()
        self._stack.callback(lock.release)
        self._stack.callback(self._place.forget)
        try:
            self._start_parts()
        except BaseException:
            self.stop()
            raise

    def _start_parts(self) -> None:
        home = self._place.home
        port = free_port(self._settings.host, self._wanted_port, self._settings.port)
        self.url = f"http://{self._settings.host}:{port}"
        postgres, broker = EmbeddedPostgres(home / "postgres"), EmbeddedBroker(home / "broker")
        self._add("postgres", postgres)
        self._database_url = postgres.url
        self._add("broker", broker)
        self._say("bringing the schema up to date")
        migrate.upgrade(postgres.url)
        environment = self._environment(postgres.url, broker.url, port)
        self._add("api", self._api(port, environment))
        self._wait_for_api()
        self.key = asyncio.run(first_key(postgres.url, self._place.first_key))
        self._add("worker", self._worker(environment))

    def _add(self, name: str, server: Any) -> None:
        if self.stopping.is_set():
            raise ServiceUnavailable("stopped while starting", code="interrupted")
        self._say(f"starting {name}")
        part = Part(name, server)
        part.start()
        self._parts.append(part)
        self._stack.callback(self._stop_part, part)
        self._note()

    def _stop_part(self, part: Part) -> None:
        self._say(f"stopping {part.name}")
        part.stop()

    def _api(self, port: int, environment: dict[str, str]) -> Program:
        argv = [
            *(sys.executable, "-m", "uvicorn", "--factory", "api.app:app", "--no-access-log"),
            *("--host", self._settings.host, "--port", str(port)),
            # Event streams never end by themselves.
            *("--timeout-graceful-shutdown", "3"),
        ]
        return Program(argv, self._place.logs / "api.log", environment, API_GRACE_S)

    def _worker(self, environment: dict[str, str]) -> Program:
        return Program(
            [sys.executable, "-m", "worker"],
            self._place.logs / "worker.log",
            environment,
            self._settings.stop_grace_s + 10,
        )

    def _environment(self, database_url: str, broker_url: str, port: int) -> dict[str, str]:
        return {
            **os.environ,
            "TUNERY_HOME": str(self._place.home),
            "TUNERY_DATABASE_URL": database_url,
            "TUNERY_BROKER_URL": broker_url,
            "TUNERY_HOST": self._settings.host,
            "TUNERY_PORT": str(port),
        }

    def _wait_for_api(self) -> None:
        api = self._parts[-1]
        deadline = time.monotonic() + API_PATIENCE_S
        while not self.stopping.is_set() and time.monotonic() < deadline:
            process = api.server.process
            if process is None or process.poll() is not None:
                break
            if answers(f"{self.url}/healthz"):
                return
            time.sleep(0.1)
        if self.stopping.is_set():
            raise ServiceUnavailable("stopped while starting", code="interrupted")
        raise self._no_api()

    def _no_api(self) -> ServiceUnavailable:
        path = self._place.logs / "api.log"
        last = tail(path).splitlines()[-1:]
        return ServiceUnavailable(
            f"the API did not start: {''.join(last)}", hint=f"its whole output is in {path}"
        )

    def run(self) -> None:
        """Watch the parts until `stopping` is set; what dies is started again."""
        while not self.stopping.wait(WATCH_S):
            if any([part.watch() for part in self._parts]):
                self._note()

    def stop(self) -> None:
        """Stop every part, last started first, and give the home up."""
        self.stopping.set()
        self._stack.close()

    def _note(self) -> None:
        self._place.write(
            {
                "url": self.url,
                "pid": os.getpid(),
                "database_url": self._database_url,
                "parts": [
                    {
                        "name": part.name,
                        "pid": part.pid,
                        "state": part.state,
                        "restarts": part.restarts,
                    }
                    for part in self._parts
                ],
            }
        )


def free_port(host: str, wanted: int | None, default: int) -> int:
    """A port to listen on: `wanted`, or else `default` if it is free, or else any.

    Raises:
        ServiceUnavailable: `wanted` is taken.
    """
    if wanted is not None:
        if wanted and not _is_free(host, wanted):
            raise ServiceUnavailable(
                f"port {wanted} of {host} is taken by another program",
                hint="choose another with --port, or leave --port out to get a free one",
            )
        return wanted or _any_port(host)
    return default if default and _is_free(host, default) else _any_port(host)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As uvicorn does: a port that a stopped API just left counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _any_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def first_key(database_url: str, path: Path) -> str:
    """The key kept in `path`; made, with the project it belongs to, where there is none that works.

    It may do everything: who can read the file owns the machine's service anyway.
    """
    db = Database(database_url, pool_size=1)
    try:
        if path.is_file():
            kept = path.read_text(encoding="utf-8").strip()
            try:
                await KeyRing(db).authenticate(kept)
            except Unauthenticated:
                log.warning("first_key.no_longer_valid", path=str(path))
            else:
                return kept
        project = await _project(db)
        _, secret = await create_key(db, project, name="first", scopes=SCOPES)
    finally:
        await db.close()
    write_private(path, secret + "\n")
    return secret


async def _project(db: Database) -> ProjectRow:
    async with db.begin() as session:
        project = await projects_table.find_project(session, PROJECT)
        if project is None:
            project = await projects_table.insert_project(session, PROJECT, weight=1.0)
    # Nobody else makes projects while the one supervisor of this home starts.
    assert project is not None
    return project


def stop_on_signals(service: EmbeddedService) -> None:
    """Make Ctrl-C, SIGTERM and a closed terminal stop the service."""

    def ask(number: int, frame: object) -> None:
        service.stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask)
