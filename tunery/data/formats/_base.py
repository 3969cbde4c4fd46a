"""What a format of rows is, and what the formats share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Row = dict[str, Any]
Severity = Literal["error", "warning", "note"]

LABEL_LIMIT = 256
"""Characters of a label."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to be said of one row. `path` is dotted, from the row's root."""

    code: str
    message: str
    path: str | None = None
    severity: Severity = "error"


@dataclass(frozen=True, slots=True)
class Format:
    """One of the shapes that a row may have.

    Attributes:
        task: that is trained on such rows where a request names none.
        spellings: sets of columns of which one must be there, whole.
        check: the findings on a row that has them.
        normal: the row's normal form, if no finding is an error.
        features: what is remarkable about a normal row, in a word each.
        labels: the class names in a normal row; None for formats without classes.
        claims: whether a row with these columns is meant, where another format spells them too.
        json_columns: columns whose cells are JSON where a file has only text for them, as CSV has.
        answers: whether a row says the right answer, as supervised training needs; a comparison of
            two answers does not.
    """

    name: str
    task: str
    spellings: tuple[frozenset[str], ...]
    check: Callable[[Row], Iterable[Finding]]
    normal: Callable[[Row], Row]
    content: tuple[str, ...]
    """Columns of the normal form that say what is learnt; the others may differ in a duplicate."""
    features: Callable[[Row], Iterable[str]] = lambda row: ()
    labels: Callable[[Row], Iterable[str]] | None = None
    claims: Callable[[Row], bool] = lambda row: True
    json_columns: frozenset[str] = frozenset()
    answers: bool = True

    def fits(self, columns: frozenset[str]) -> frozenset[str] | None:
        """The spelling that is there."""
        return next((spelling for spelling in self.spellings if spelling <= columns), None)

    def lacking(self, columns: frozenset[str]) -> frozenset[str]:
        """The fewest columns that would make it fit."""
        return min((s - columns for s in self.spellings if s & columns), key=len, default=columns)


def columns_of(row: Row) -> frozenset[str]:
    """Columns with a value."""
    return frozenset(key for key, value in row.items() if value is not None)


def check_strings(*columns: str) -> Callable[[Row], Iterator[Finding]]:
    """Each column a string, the last one, which is learnt, not an empty one."""

    def checked(row: Row) -> Iterator[Finding]:
        wrong = [column for column in columns if not isinstance(row[column], str)]
        for column in wrong:
            yield Finding("wrong_type", f"{column} must be a string", column)
        if not wrong and not row[columns[-1]].strip():
            yield Finding("no_trainable_tokens", f"{columns[-1]} is empty", columns[-1], "warning")

    return checked


def check_label(label: Any, path: str) -> Iterator[Finding]:
    """A class name, or a whole number that is one."""
    if isinstance(label, bool) or not isinstance(label, str | int):
        yield Finding("wrong_type", f"{path} must be a string or an integer", path)
    elif label == "":
        yield Finding("missing_field", f"{path} is empty", path)
    elif isinstance(label, str) and len(label) > LABEL_LIMIT:
        yield Finding("wrong_type", f"{path} has more than {LABEL_LIMIT} characters", path)


def as_it_is(row: Row) -> Row:
    """A row that is its own normal form."""
    return {key: value for key, value in row.items() if value is not None}


def number_of(value: Any) -> float | None:
    """A finite number, or text that is one, as text is all that CSV has; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
