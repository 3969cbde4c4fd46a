"""regression: {"text", "target"}, the target a number, and `text_pair` for pairs.

Of pairs, the target may be called score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, as_it_is, check_strings, number_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def _column(row: Row) -> str:
    return "target" if row.get("target") is not None else "score"


def _check(row: Row) -> Iterator[Finding]:
    for column in ("text", "text_pair"):
        if row.get(column) is not None:
            yield from check_strings(column)(row)
    if number_of(row[_column(row)]) is None:
        yield Finding("wrong_type", f"{_column(row)} must be a number", _column(row))


def _normal(row: Row) -> Row:
    made = {key: value for key, value in as_it_is(row).items() if key != "score"}
    return {**made, "target": number_of(row[_column(row)])}


FORMAT = Format(
    name="regression",
    task="text-regression",
    spellings=(frozenset({"text", "target"}), frozenset({"text", "text_pair", "score"})),
    check=_check,
    normal=_normal,
    content=("text", "text_pair", "target"),
)
