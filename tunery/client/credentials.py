"""Which service, and with which key: an argument, the environment, `tunery login`, or this machine.

The first that is there wins. A service started by `tunery up` is found by what it wrote into its
home folder, so that on one machine nobody has to log in.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.client.wire import root_of
from tunery.errors import Unauthenticated

DEFAULT_URL = "http://127.0.0.1:8300"


@dataclass(frozen=True)
class Credentials:
    """An address and a key, and where they were found."""

    base_url: str
    api_key: str
    source: str


def find(base_url: str | None = None, api_key: str | None = None) -> Credentials:
    """The credentials to use.

    Raises:
        Unauthenticated: no key is to be found.
    """
    url = base_url or os.environ.get("TUNERY_BASE_URL")
    key = api_key or os.environ.get("TUNERY_API_KEY")
    if key:
        return Credentials(root_of(url or _local().get("url") or DEFAULT_URL), key, "environment")
    for source, found in (("login", _stored()), ("local service", _local())):
        if "api_key" in found and (url is None or root_of(url) == found["url"]):
            return Credentials(found["url"], found["api_key"], source)
    raise Unauthenticated(
        "no API key",
        hint="`tunery login` stores one, TUNERY_API_KEY names one, `tunery up` makes one",
    )


def home() -> Path:
    """The folder of a service on this machine."""
    return Path(os.environ.get("TUNERY_HOME") or "~/.tunery").expanduser().resolve()


def store(base_url: str, api_key: str) -> Path:
    """Keep credentials for later commands, readable by this user only; returns the file."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, draft = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump({"url": root_of(base_url), "api_key": api_key}, stream)
    os.replace(draft, path)
    return path


def _file() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "tunery" / "credentials.json"


def _stored() -> dict[str, Any]:
    return _read_json(_file())


def _local() -> dict[str, Any]:
    note = _read_json(home() / "run" / "service.json")
    key = home() / "first-key"
    if not key.is_file():
        return {}
    return {"url": note.get("url", DEFAULT_URL), "api_key": key.read_text(encoding="utf-8").strip()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
