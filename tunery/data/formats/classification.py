"""classification: {"text", "label"}, or "labels"; the label becomes a string.

Of a pair, the second text is `text_pair`; sentence1 and sentence2, or premise and hypothesis, are
a pair as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, check_label, check_strings

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"))


def _texts(row: Row) -> tuple[str, ...]:
    """The columns of the texts."""
    if row.get("text") is not None:
        return ("text", "text_pair") if row.get("text_pair") is not None else ("text",)
    return next(pair for pair in _PAIRS if all(row.get(column) is not None for column in pair))


def _check(row: Row) -> Iterator[Finding]:
    for column in _texts(row):
        yield from check_strings(column)(row)
    column = "label" if row.get("label") is not None else "labels"
    yield from check_label(row[column], column)


def _normal(row: Row) -> Row:
    texts = _texts(row)
    made = {key: row[key] for key in row if key not in ("labels", *texts) and row[key] is not None}
    made |= {new: row[old] for new, old in zip(("text", "text_pair"), texts, strict=False)}
    label = row["label"] if row.get("label") is not None else row["labels"]
    made["label"] = str(label)
    return made


FORMAT = Format(
    name="classification",
    task="text-classification",
    spellings=(
        frozenset({"text", "label"}),
        frozenset({"text", "labels"}),
        *(frozenset({*pair, "label"}) for pair in _PAIRS),
    ),
    check=_check,
    normal=_normal,
    content=("text", "text_pair", "label"),
    labels=lambda row: (row["label"],),
    claims=lambda row: row.get("label") is not None or not isinstance(row.get("labels"), list),
)
