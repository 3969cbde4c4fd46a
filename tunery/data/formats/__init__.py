"""The shapes that a row may have: which one it is, whether it is sound, and its one normal form.

Each format is a module here, its last statement `FORMAT = Format(...)`, or another package's entry
point in the group `tunery.formats`; nothing else names it. Other columns stay in the row: prompt
templates may use them. No message quotes a row, and no path names a key that is not ours: either
may be somebody's secret.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, Severity, columns_of
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "Finding",
    "Format",
    "Row",
    "Severity",
    "check",
    "detect",
    "find",
    "json_columns",
    "known",
    "sorted_labels",
    "with_answers",
]


@cache
def known() -> dict[str, Format]:
    """All formats by name, sorted.

    Raises:
        RuntimeError: a module lacks `FORMAT`, or two formats have one name.
    """
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_")
    ]
    forms = []
    for module in modules:
        if not hasattr(module, "FORMAT"):
            raise RuntimeError(f"{module.__name__} stands among the formats but has no FORMAT")
        forms.append(module.FORMAT)
    forms += [point.load() for point in entry_points(group="tunery.formats")]
    found: dict[str, Format] = {}
    for form in forms:
        if form.name in found:
            raise RuntimeError(f"two formats are named {form.name!r}")
        found[form.name] = form
    return dict(sorted(found.items()))


def find(name: str) -> Format:
    """The format of that name.

    Raises:
        InvalidConfig: there is none.
    """
    if name not in known():
        raise InvalidConfig(
            f"there is no data format {name!r}", hint=f"known: {', '.join(known())}"
        )
    return known()[name]


@cache
def with_answers() -> frozenset[str]:
    """Names of the formats whose rows say the right answer."""
    return frozenset(name for name, form in known().items() if form.answers)


@cache
def json_columns() -> frozenset[str]:
    """Columns whose cells are JSON, over all formats."""
    return frozenset().union(*(form.json_columns for form in known().values()))


def detect(row: Row) -> Format | Finding:
    """The format of a row, or why it has none."""
    columns = columns_of(row)
    matches = [
        (form, used)
        for form in known().values()
        if (used := form.fits(columns)) and form.claims(row)
    ]
    # What is part of another match is no match of its own: text and label is not text.
    whole = [form for form, used in matches if not any(used < other for _, other in matches)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        names = " and of ".join(form.name for form in whole)
        return Finding("mixed_formats", f"a row with the columns of {names}; keep those of one")
    near = [
        form
        for form in known().values()
        if form.fits(columns) is None and any(s & columns for s in form.spellings)
    ]
    if near:
        return _lacks(min(near, key=lambda form: len(form.lacking(columns))), columns)
    shapes = "; ".join(f"{form.name}: {_spelled(form)}" for form in known().values())
    return Finding("unknown_format", f"no known format has these columns. Known are {shapes}")


def check(row: Row, expected: Format) -> Iterator[Finding]:
    """What is wrong, or noteworthy, with a row of a file in that format."""
    columns = columns_of(row)
    if expected.fits(columns) is None:
        found = detect(row)
        # A row that merely lacks a column is of this format still.
        if isinstance(found, Format) and not _is_part(found, expected):
            yield Finding("mixed_formats", f"a {found.name} row in a file of {expected.name} rows")
        elif isinstance(found, Finding) and found.code == "unknown_format" and columns:
            yield found
        else:
            yield _lacks(expected, columns)
        return
    yield from expected.check(row)


def _is_part(small: Format, large: Format) -> bool:
    return any(a < b for a in small.spellings for b in large.spellings)


def _spelled(form: Format) -> str:
    return " or ".join(", ".join(sorted(spelling)) for spelling in form.spellings)


def _lacks(form: Format, columns: frozenset[str]) -> Finding:
    nearest = max(form.spellings, key=lambda spelling: len(spelling & columns))
    missing = sorted(nearest - columns)
    return Finding("missing_field", f"a {form.name} row needs {', '.join(missing)}", missing[0])


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Labels in id order: by number where all are whole numbers, else by code point."""
    found = set(labels)
    if all(label.removeprefix("-").isdecimal() and label.isascii() for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)
