"""Finds every entry of every shelf, and publishes it.

Entries are found by package discovery and, for other people's packages, by entry points in the
groups `tunery.adapters`, `tunery.methods`, `tunery.tasks`, `tunery.transforms` and
`tunery.rewards`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, overload

from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from tunery.entries import Adapter, Entry, Method, Reward, Task, Transform

Shelf = Literal["adapters", "methods", "tasks", "transforms", "rewards"]
SHELVES: tuple[Shelf, ...] = get_args(Shelf)


@cache
def entries(shelf: Shelf) -> dict[str, Entry]:
    """All entries of a shelf by name, sorted.

    Raises:
        RuntimeError: a module lacks `ENTRY`, or two entries claim one name.
    """
    package = importlib.import_module(f"tunery.{shelf}")
    found: dict[str, Entry] = {}
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    ]
    classes = []
    for module in modules:
        if not hasattr(module, "ENTRY"):
            raise RuntimeError(f"{module.__name__} stands on a shelf but has no ENTRY")
        classes.append(module.ENTRY)
    classes += [point.load() for point in entry_points(group=f"tunery.{shelf}")]
    for cls in classes:
        if cls.name in found:
            raise RuntimeError(f"two entries of {shelf} are named {cls.name!r}")
        found[cls.name] = cls()
    return dict(sorted(found.items()))


@overload
def find(shelf: Literal["adapters"], name: str, param: str = ...) -> Adapter: ...
@overload
def find(shelf: Literal["methods"], name: str, param: str = ...) -> Method: ...
@overload
def find(shelf: Literal["tasks"], name: str, param: str = ...) -> Task: ...
@overload
def find(shelf: Literal["transforms"], name: str, param: str = ...) -> Transform: ...
@overload
def find(shelf: Literal["rewards"], name: str, param: str = ...) -> Reward: ...
@overload
def find(shelf: Shelf, name: str, param: str = ...) -> Entry: ...
def find(shelf: Shelf, name: str, param: str = "type") -> Any:
    """The entry of that name.

    Raises:
        InvalidConfig: no such entry; names the nearest ones.
    """
    known = entries(shelf)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise InvalidConfig(
        f"{param}: there is no {shelf[:-1]} {name!r}",
        code="unsupported_method" if shelf == "methods" else "invalid_value",
        hint=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}",
        param=param,
    )


def describe(shelf: Shelf, name: str) -> dict[str, Any]:
    """What the catalogue publishes of an entry: plain JSON."""
    entry = find(shelf, name)
    works_with = {
        key: sorted(value)
        for key in ("tasks", "methods", "formats")
        if (value := getattr(entry, key, None)) is not None
    }
    row = getattr(entry, "example_row", None)
    return {
        "object": "fine_tuning.catalogue.entry",
        "shelf": shelf,
        "name": entry.name,
        "title": entry.title,
        "summary": entry.summary,
        "paper": entry.paper,
        "schema": entry.Config.model_json_schema(),
        "works_with": works_with,
        "metrics": list(getattr(entry, "metrics", ())),
        "example": cast("dict[str, Any]", dict(entry.example)),
        "example_row": dict(row) if row is not None else None,
    }
