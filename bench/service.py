"""A service to measure: durable Postgres, broker, one API process and, if wanted, a worker."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import psycopg

from bench.load import Address
from core.db import migrate
from core.local.broker import EmbeddedBroker
from core.local.postgres import EmbeddedPostgres
from worker.local.parts import Program
from worker.local.place import answers
from worker.local.up import first_key, free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

HOST = "127.0.0.1"
PATIENCE_S = 60.0


class ServiceUnderTest:
    """Everything in a temporary folder; a context manager.

    Attributes:
        home: the folder; base models are in `models`.
        address, key: of the API, once it runs.
    """

    def __init__(self, *, worker: bool, environment: dict[str, str] | None = None) -> None:
        self._with_worker = worker
        self._extra = environment or {}
        self._stack = ExitStack()
        self.key = ""
        self.api: Program
        self.worker: Program

    def __enter__(self) -> ServiceUnderTest:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tunery-bench-"))
        self.home = Path(folder)
        self.home.chmod(0o755)  # Postgres may run as another account than ours
        self.postgres = self._stack.enter_context(EmbeddedPostgres(self.home / "postgres"))
        broker = self._stack.enter_context(EmbeddedBroker(self.home / "broker"))
        migrate.upgrade(self.postgres.url)
        port = free_port(HOST, None, 0)
        self.address = Address(HOST, port)
        self.environment = {
            "TUNERY_HOME": str(self.home),
            "TUNERY_DATABASE_URL": self.postgres.url,
            "TUNERY_BROKER_URL": broker.url,
            "TUNERY_HUB_ALLOWED": "false",
            "TUNERY_DEVICES": "cpu",
            **self._extra,
        }
        server = [sys.executable, "-m", "uvicorn", "--factory", "api.app:app", "--no-access-log"]
        self.api = self._program("api", [*server, "--host", HOST, "--port", str(port)])
        _until(lambda: answers(f"{self.url}/readyz"), self.api)
        self.key = asyncio.run(first_key(self.postgres.url, self.home / "first-key"))
        if self._with_worker:
            self.worker = self._program("worker", [sys.executable, "-m", "worker"])
            _until(self._worker_is_there, self.worker)

    def _program(self, name: str, command: list[str]) -> Program:
        program = Program(command, self.home / f"{name}.log", os.environ | self.environment, 30.0)
        program.start()
        self._stack.callback(program.stop)
        return program

    def _worker_is_there(self) -> bool:
        return bool(self.query("select 1 from workers"))

    @property
    def url(self) -> str:
        return f"http://{self.address.host}:{self.address.port}"

    def client(self) -> httpx2.Client:
        """A client with the first key."""
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=600, trust_env=False)

    def upload(self, content: bytes, name: str = "train.jsonl") -> str:
        """Upload a training file and wait until it is validated; returns its id."""
        with self.client() as client:
            answer = client.post(
                "/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, content)}
            )
            file = _json(answer)
            while file["status"] == "uploaded":
                time.sleep(0.05)
                file = _json(client.get(f"/v1/files/{file['id']}"))
        if file["status"] != "processed":
            raise RuntimeError(f"the file was not accepted: {file}")
        return str(file["id"])

    def create(self, body: dict[str, Any]) -> str:
        """Create a job; returns its id."""
        with self.client() as client:
            return str(_json(client.post("/v1/fine_tuning/jobs", json=body))["id"])

    def wait(self, job: str, patience_s: float = 300.0) -> dict[str, Any]:
        """Wait for a job to succeed.

        Raises:
            RuntimeError: it ended otherwise, or not in time.
        """
        until = time.monotonic() + patience_s
        with self.client() as client:
            while time.monotonic() < until:
                found: dict[str, Any] = _json(client.get(f"/v1/fine_tuning/jobs/{job}"))
                if found["status"] == "succeeded":
                    return found
                if found["status"] in ("failed", "cancelled"):
                    break
                time.sleep(0.1)
        raise RuntimeError(f"the job did not succeed: {found['status']} {found['error']}")

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Look into the database, past the service."""
        with psycopg.connect(plain(self.postgres.url), autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


def plain(url: str) -> str:
    """SQLAlchemy's URL as psycopg reads it."""
    return url.replace("postgresql+psycopg://", "postgresql://")


def _json(answer: httpx2.Response) -> Any:
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code}: {answer.text[:500]}")
    return answer.json()


def _until(ready: Callable[[], bool], program: Program) -> None:
    until = time.monotonic() + PATIENCE_S
    while not ready():
        died = program.process is None or program.process.poll() is not None
        if died or time.monotonic() > until:
            raise RuntimeError(f"not ready: {program.log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)
