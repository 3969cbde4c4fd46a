"""A job file: the create request's body as YAML or JSON, with overrides from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tunery import catalogue
from tunery.errors import InvalidConfig
from tunery.request import JobRequest

TOP = frozenset(JobRequest.model_fields) - {"ignored"} | {"hyperparameters"}


def read(path: Path) -> dict[str, Any]:
    """The body in a file; `-` is stdin's path, which the caller resolves.

    Raises:
        InvalidConfig: it cannot be read, or is not a mapping.
    """
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfig(f"{path} cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise InvalidConfig(f"{path} is not a mapping of the create request's members")
    return body


def override(body: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """`body` with each `path=value` set; values are read as YAML.

    A path is one of the request (`ext.compute.gpus=2`), or shorter: `adapter.r=32` and
    `learning_rate=1e-4` go into the method's part, `lora.r=32` also names the adapter.

    Raises:
        InvalidConfig: no `=` in a setting, or its path runs into a value.
    """
    for setting in settings:
        path, equals, raw = setting.partition("=")
        if not equals or not path:
            raise InvalidConfig(f"--set {setting!r}: path=value is expected")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise InvalidConfig(f"--set {setting!r}: the value is not YAML") from error
        _put(body, _full(body, path.split(".")), _number(value), path)
    return body


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string; nobody means that."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _full(body: dict[str, Any], path: list[str]) -> list[str]:
    if path[0] in TOP:
        return path
    method = body.setdefault("method", {"type": "supervised"})
    kind = method.get("type", "supervised")
    if path[0] in ("adapter", "hyperparameters"):
        return ["method", kind, *path]
    if len(path) > 1 and path[0] in catalogue.entries("adapters"):
        adapter = method.setdefault(kind, {}).setdefault("adapter", {})
        adapter["type"] = path[0]
        return ["method", kind, "adapter", *path[1:]]
    return ["method", kind, "hyperparameters", *path]


def _put(body: dict[str, Any], path: list[str], value: Any, shown: str) -> None:
    at = body
    for key in path[:-1]:
        inner = at.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InvalidConfig(f"--set {shown}: {key} is a value, not a mapping")
        at = inner
    at[path[-1]] = value


def is_local(reference: Any) -> bool:
    """Whether a file reference is a path of this machine rather than a file id."""
    return isinstance(reference, str) and not reference.startswith("file-")
