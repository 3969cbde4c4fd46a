"""unpaired_preference: {"prompt", "completion", "label"}; whether a reply was wanted.

Prompt and completion are conversations, or strings, which become one message each. The label is
true or false; 1, 0 and the words are taken for them, as CSV has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.data.formats._base import Finding, Format, Row
from tunery.data.formats._messages import (
    check_messages,
    check_tools,
    declared,
    normal_messages,
)
from tunery.data.formats.preference import check_output, spoken

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORDS = {"true": True, "false": False, "1": True, "0": False}


def _label(value: Any) -> bool | None:
    """The label that is meant; None if it is none."""
    if isinstance(value, bool | int | str):
        return _WORDS.get(str(value).lower())
    return None


def _check(row: Row) -> Iterator[Finding]:
    yield from check_tools(row.get("tools"))
    prompt, completion = spoken("user", row["prompt"]), spoken("assistant", row["completion"])
    yield from check_messages(prompt, "prompt", declared(row.get("tools")))
    yield from check_output(completion, "completion")
    if _label(row["label"]) is None:
        yield Finding("wrong_type", "label must be true or false", "label")


def _normal(row: Row) -> Row:
    made = {key: value for key, value in row.items() if value is not None}
    return {
        **made,
        "prompt": normal_messages(spoken("user", row["prompt"])),
        "completion": normal_messages(spoken("assistant", row["completion"])),
        "label": _label(row["label"]),
    }


def _features(row: Row) -> Iterator[str]:
    if row.get("tools"):
        yield "tools"
    if row["prompt"][0]["role"] in ("system", "developer"):
        yield "system"
    if any(message["role"] == "assistant" for message in row["prompt"]):
        yield "multi_turn"


FORMAT = Format(
    name="unpaired_preference",
    task="text-generation",
    spellings=(frozenset({"prompt", "completion", "label"}),),
    check=_check,
    normal=_normal,
    content=("prompt", "completion", "label"),
    features=_features,
    claims=lambda row: _label(row["label"]) is not None,
    json_columns=frozenset({"tools"}),
    answers=False,
)
