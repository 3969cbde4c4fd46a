"""similarity: {"sentence1", "sentence2", "score"}: how alike two sentences are, as a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, as_it_is, check_strings, number_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check(row: Row) -> Iterator[Finding]:
    for column in ("sentence1", "sentence2"):
        yield from check_strings(column)(row)
    if number_of(row["score"]) is None:
        yield Finding("wrong_type", "score must be a number", "score")


def _normal(row: Row) -> Row:
    return {**as_it_is(row), "score": number_of(row["score"])}


FORMAT = Format(
    name="similarity",
    task="text-regression",
    spellings=(frozenset({"sentence1", "sentence2", "score"}),),
    check=_check,
    normal=_normal,
    content=("sentence1", "sentence2", "score"),
)
