from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tunery.cli import output
from tunery.cli.main import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Answer = tuple[int, Any]

JOB = {
    "id": "ftjob-1",
    "status": "running",
    "model": "base",
    "created_at": 1_700_000_000,
    "training_file": "file-1",
    "method": {"type": "supervised"},
    "ext": {"phase": "training", "progress": {"step": 2, "total_steps": 4}},
}


class Service:
    """A socket that answers like the service. `answers` maps "GET /path" to what it says."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer | Callable[[Any], Answer]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.url = ""

    def answer(self, method: str, path: str, body: Any) -> Answer:
        route = f"{method} {path.split('?')[0]}"
        self.asked.append((route, body))
        found = self.answers.get(route)
        if found is None:
            error = {"message": f"nothing at {route}", "type": "x", "param": None, "code": "x"}
            return 404, {"error": error}
        return found(body) if callable(found) else found


def _handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            raw = self.rfile.read(size)
            is_json = "json" in self.headers.get("content-type", "")
            status, body = service.answer(
                self.command, self.path, json.loads(raw) if is_json else raw
            )
            text = body if isinstance(body, str) else json.dumps(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_DELETE = _reply  # noqa: N815 - the names that the server calls

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    """The service that this test's commands talk to."""
    found = Service()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("TUNERY_BASE_URL", found.url)
    monkeypatch.setenv("TUNERY_API_KEY", "ft_test")
    monkeypatch.setenv("TUNERY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tunery(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command line in this process: exit code, stdout, stderr. stdout is a pipe."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what was said before
        code = run(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    yield call
    output.manner.quiet = output.manner.no_input = False
