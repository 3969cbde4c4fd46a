"""multi_label: {"text", "labels": [...]}, and `text_pair` for pairs; the list may be empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, as_it_is, check_label, check_strings

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check(row: Row) -> Iterator[Finding]:
    for column in ("text", "text_pair"):
        if row.get(column) is not None:
            yield from check_strings(column)(row)
    if not isinstance(row["labels"], list):
        yield Finding("wrong_type", "labels must be a list", "labels")
        return
    for place, label in enumerate(row["labels"]):
        yield from check_label(label, f"labels.{place}")


def _normal(row: Row) -> Row:
    return {**as_it_is(row), "labels": sorted({str(label) for label in row["labels"]})}


FORMAT = Format(
    name="multi_label",
    task="multi-label-classification",
    spellings=(frozenset({"text", "labels"}),),
    check=_check,
    normal=_normal,
    content=("text", "text_pair", "labels"),
    labels=lambda row: row["labels"],
    claims=lambda row: isinstance(row.get("labels"), list) and row.get("label") is None,
    json_columns=frozenset({"labels"}),
)
