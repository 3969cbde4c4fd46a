"""pairs: {"anchor", "positive"}, texts that belong together, and perhaps some that do not.

Those are `negative`, a text, or `negatives`, a list. question and answer, or query and document,
are a pair as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.data.formats._base import Finding, Format, Row, as_it_is

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPELLINGS = (("anchor", "positive"), ("question", "answer"), ("query", "document"))


def _pair(row: Row) -> tuple[str, str]:
    return next(pair for pair in _SPELLINGS if all(row.get(column) is not None for column in pair))


def _negatives(row: Row) -> list[Any]:
    many = row.get("negatives")
    return ([] if row.get("negative") is None else [row["negative"]]) + list(many or ())


def _check(row: Row) -> Iterator[Finding]:
    many = row.get("negatives")
    if many is not None and not isinstance(many, list):
        yield Finding("wrong_type", "negatives must be a list", "negatives")
        return
    texts = {column: row[column] for column in _pair(row)}
    if row.get("negative") is not None:
        texts["negative"] = row["negative"]
    texts |= {f"negatives.{i}": text for i, text in enumerate(many or ())}
    for path, text in texts.items():
        if not isinstance(text, str):
            yield Finding("wrong_type", "a text must be a string", path)
        elif not text.strip():
            yield Finding("no_trainable_tokens", "a text is empty", path, "warning")


def _normal(row: Row) -> Row:
    gone = {*_pair(row), "negative", "negatives"}
    made = {key: value for key, value in as_it_is(row).items() if key not in gone}
    anchor, positive = (row[column] for column in _pair(row))
    return {**made, "anchor": anchor, "positive": positive, "negatives": _negatives(row)}


FORMAT = Format(
    name="pairs",
    task="sentence-embedding",
    spellings=tuple(frozenset(pair) for pair in _SPELLINGS),
    check=_check,
    normal=_normal,
    content=("anchor", "positive", "negatives"),
    json_columns=frozenset({"negatives"}),
    answers=False,
)
