"""prompt: {"messages"} that ends with what is asked, or {"prompt"}: a text or a list of messages.

Nobody answers: methods that learn from the model's own completions do, and graders read what else
the row has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, as_it_is, columns_of
from tunery.data.formats._messages import check_messages, check_tools, declared, normal_messages

if TYPE_CHECKING:
    from collections.abc import Iterator


def _claims(row: Row) -> bool:
    """A conversation in which the assistant has not spoken yet, else it is chat data; a `prompt`
    with something beside it to judge answers by, else it more likely lacks its completion."""
    messages = row.get("messages")
    if messages is None:
        return len(columns_of(row)) > 1
    if not isinstance(messages, list) or not messages:
        return False
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    return len(roles) == len(messages) and "user" in roles and "assistant" not in roles


def _check(row: Row) -> Iterator[Finding]:
    if row.get("messages") is None and isinstance(row["prompt"], str):
        if not row["prompt"].strip():
            yield Finding("no_trainable_tokens", "prompt is empty", "prompt", "warning")
        return
    path = "messages" if row.get("messages") is not None else "prompt"
    yield from check_tools(row.get("tools"))
    broken = False
    for finding in check_messages(row[path], path, declared(row.get("tools"))):
        broken |= finding.severity == "error"
        yield finding
    if not broken and row[path][-1]["role"] == "assistant":
        yield Finding(
            "bad_role_order", "a prompt ends before the reply", f"{path}.{len(row[path]) - 1}"
        )


def _normal(row: Row) -> Row:
    made = as_it_is(row)
    if "messages" in made:
        made["messages"] = normal_messages(made["messages"])
    elif not isinstance(made["prompt"], str):
        made["messages"] = normal_messages(made.pop("prompt"))
    return made


def _features(row: Row) -> Iterator[str]:
    messages = row.get("messages") or []
    if row.get("tools"):
        yield "tools"
    if messages and messages[0]["role"] in ("system", "developer"):
        yield "system"
    if any(message["role"] == "assistant" for message in messages):
        yield "multi_turn"


FORMAT = Format(
    name="prompt",
    task="text-generation",
    spellings=(frozenset({"messages"}), frozenset({"prompt"})),
    check=_check,
    normal=_normal,
    content=("messages", "prompt", "tools"),
    features=_features,
    claims=_claims,
    json_columns=frozenset({"messages", "tools"}),
    answers=False,
)
