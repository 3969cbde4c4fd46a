"""classification: {"text", "label"}, or "labels"; the label becomes a string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, check_label, check_strings

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check(row: Row) -> Iterator[Finding]:
    yield from check_strings("text")(row)
    column = "label" if row.get("label") is not None else "labels"
    yield from check_label(row[column], column)


def _normal(row: Row) -> Row:
    made = {key: value for key, value in row.items() if key != "labels" and value is not None}
    label = row["label"] if row.get("label") is not None else row["labels"]
    made["label"] = str(label)
    return made


FORMAT = Format(
    name="classification",
    task="text-classification",
    spellings=(frozenset({"text", "label"}), frozenset({"text", "labels"})),
    check=_check,
    normal=_normal,
    content=("text", "label"),
    labels=lambda row: (row["label"],),
)
