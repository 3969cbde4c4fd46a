"""token_classification: {"tokens": [...], "tags": [...]}, a tag per token.

Tags may be called ner_tags, and be whole numbers. Where a file has only text for a cell, a list is
JSON, or words with blanks between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.data.formats._base import Finding, Format, Row, check_label

if TYPE_CHECKING:
    from collections.abc import Iterator


def _tags_column(row: Row) -> str:
    return "tags" if row.get("tags") is not None else "ner_tags"


def _listed(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


def _check(row: Row) -> Iterator[Finding]:
    column = _tags_column(row)
    tokens, tags = _listed(row["tokens"]), _listed(row[column])
    for name, value in (("tokens", tokens), (column, tags)):
        if not isinstance(value, list):
            yield Finding("wrong_type", f"{name} must be a list", name)
            return
    if not tokens:
        yield Finding("missing_field", "there are no tokens", "tokens")
    for place, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            yield Finding(
                "wrong_type", "a token must be a string, not a blank one", f"tokens.{place}"
            )
            return
    for place, tag in enumerate(tags):
        wrong = next(check_label(tag, f"{column}.{place}"), None)
        if wrong is not None:
            yield wrong
            return
    if len(tokens) != len(tags):
        yield Finding("wrong_length", f"{len(tokens)} tokens and {len(tags)} tags", column)


def _normal(row: Row) -> Row:
    made = {key: value for key, value in row.items() if key != "ner_tags" and value is not None}
    made["tokens"] = _listed(row["tokens"])
    made["tags"] = [str(tag) for tag in _listed(row[_tags_column(row)])]
    return made


FORMAT = Format(
    name="token_classification",
    task="token-classification",
    spellings=(frozenset({"tokens", "tags"}), frozenset({"tokens", "ner_tags"})),
    check=_check,
    normal=_normal,
    content=("tokens", "tags"),
    labels=lambda row: row["tags"],
    json_columns=frozenset({"tokens", "tags", "ner_tags"}),
)
