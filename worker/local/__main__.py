"""`python -m worker.local up | status | down`: what `tunery up` and its kin start.

Exit codes are the command line's: 0 done, 6 already running, 7 not running or a part is away.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from core.settings import Settings
from tunery.errors import AppError, Conflict
from worker.local.place import Place, answers

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.local.up import EmbeddedService

CONFLICT, UNAVAILABLE = 6, 7
DOWN_PATIENCE_S = 90.0


def main(argv: list[str] | None = None) -> int:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    options = _parser().parse_args(argv)
    settings = Settings() if options.home is None else Settings(home=options.home)
    commands: dict[str, Callable[[], int]] = {
        "up": lambda: up(settings, options.port, options.json),
        "status": lambda: status(Place(settings.resolved_home()), options.json),
        "down": lambda: down(Place(settings.resolved_home())),
    }
    try:
        return commands[options.command]()
    except AppError as error:
        _say(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""))
        return CONFLICT if isinstance(error, Conflict) else UNAVAILABLE


def up(settings: Settings, port: int | None, as_json: bool) -> int:
    """Run the service until Ctrl-C."""
    # Here, because `status` and `down` should not wait for the database's libraries to load.
    from worker.local.up import EmbeddedService, stop_on_signals

    service = EmbeddedService(settings, port, _say)
    stop_on_signals(service)
    try:
        service.start()
        home = settings.resolved_home()
        facts = {
            "url": service.url,
            "api_key_file": str(home / "first-key"),
            "home": str(home),
            "pid": os.getpid(),
        }
        _out(json.dumps(facts) if as_json else _welcome(service, home))
        service.run()
    except AppError as error:
        if error.code != "interrupted":
            raise
    finally:
        service.stop()
    _say("stopped; everything is kept, the next `tunery up` goes on from here")
    return 0


def _welcome(service: EmbeddedService, home: Path) -> str:
    return "\n".join(
        [
            f"Tunery runs at {service.url}",
            f"  API key  {service.key}",
            f"           (kept in {home}/first-key; the command line finds it there)",
            f"  state    {home}",
            f"  logs     {home}/logs",
            "Next, in another terminal: `tunery jobs ls`, or",
            f"  OPENAI_BASE_URL={service.url}/v1 OPENAI_API_KEY=$(cat {home}/first-key) python",
            "Ctrl-C stops it.",
        ]
    )


def status(place: Place, as_json: bool) -> int:
    """Say what runs; 7 when nothing does."""
    note = place.read() if place.is_running() else None
    if note is None:
        _out(json.dumps({"running": False})) if as_json else _say(
            f"nothing runs on {place.home}; start it with `tunery up`"
        )
        return UNAVAILABLE
    healthy = answers(f"{note['url']}/readyz")
    if as_json:
        _out(json.dumps({"running": True, "ready": healthy, **note}))
    else:
        lines = [f"{note['url']}  {'ready' if healthy else 'not ready'}  pid {note['pid']}"]
        lines += [
            f"  {part['name']:<9} {part['state']:<11} pid {part['pid']}, "
            f"{part['restarts']} restarts"
            for part in note["parts"]
        ]
        _out("\n".join(lines))
    return 0 if healthy else UNAVAILABLE


def down(place: Place) -> int:
    """Stop the service of a home and wait for its end."""
    note = place.read()
    if note is None or not place.is_running():
        _say(f"nothing runs on {place.home}")
        return 0
    os.kill(note["pid"], signal.SIGTERM)
    deadline = time.monotonic() + DOWN_PATIENCE_S
    while place.is_running():
        if time.monotonic() > deadline:
            _say(f"process {note['pid']} is still stopping; its logs are in {place.logs}")
            return UNAVAILABLE
        time.sleep(0.1)
    _say("stopped")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tunery", description=__doc__)
    parser.add_argument("command", choices=["up", "status", "down"])
    parser.add_argument("--home", type=Path, help="folder of all state; TUNERY_HOME or ~/.tunery")
    parser.add_argument("--port", type=int, help="of the API; 0 takes any free one")
    parser.add_argument("--json", action="store_true", help="facts as one JSON object")
    return parser


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
