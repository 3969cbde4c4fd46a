"""chat: {"messages": [{"role", "content", "weight"?, ...}], "tools"?}"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats import prompt
from tunery.data.formats._base import Finding, Format, Row
from tunery.data.formats._messages import check_messages, check_tools, declared, normal_messages

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check(row: Row) -> Iterator[Finding]:
    yield from check_tools(row.get("tools"))
    messages = row["messages"]
    broken = False
    for finding in check_messages(messages, "messages", declared(row.get("tools"))):
        broken |= finding.severity == "error"
        yield finding
    if broken:
        return
    replies = [message for message in messages if message["role"] == "assistant"]
    if not replies:
        yield Finding("no_assistant_turn", "nobody answers: there is nothing to learn", "messages")
    elif not any(_teaches(reply) for reply in replies):
        yield Finding(
            "no_trainable_tokens", "every reply is empty or has weight 0", "messages", "warning"
        )
    elif messages[-1]["role"] != "assistant":
        yield Finding(
            "bad_role_order",
            "what follows the last reply is not trained",
            f"messages.{len(messages) - 1}",
            "warning",
        )


def _teaches(reply: Row) -> bool:
    return reply.get("weight") != 0 and bool(reply.get("content") or reply.get("tool_calls"))


def _normal(row: Row) -> Row:
    made = {key: value for key, value in row.items() if value is not None}
    made["messages"] = normal_messages(row["messages"])
    return made


def _features(row: Row) -> Iterator[str]:
    messages = row["messages"]
    if row.get("tools"):
        yield "tools"
    if messages[0]["role"] in ("system", "developer"):
        yield "system"
    if any("weight" in message for message in messages):
        yield "weights"
    if sum(message["role"] == "assistant" for message in messages) > 1:
        yield "multi_turn"


FORMAT = Format(
    name="chat",
    claims=lambda row: not prompt.FORMAT.claims(row),
    task="text-generation",
    spellings=(frozenset({"messages"}),),
    check=_check,
    normal=_normal,
    content=("messages", "tools"),
    features=_features,
    json_columns=frozenset({"messages", "tools"}),
)
