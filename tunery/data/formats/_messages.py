"""Conversations: what is wrong with one, and its normal form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tunery.data.formats._base import Finding, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Any, path: str, tools: frozenset[str] | None) -> Iterator[Finding]:
    """Findings on a conversation. `tools` are the declared functions; None: none are declared."""
    if not isinstance(messages, list):
        yield Finding("wrong_type", "a list of messages is expected", path)
        return
    if not messages:
        yield Finding("empty_messages", "there are no messages", path)
        return
    grammar = _Grammar(tools)
    for i, message in enumerate(messages):
        at = f"{path}.{i}"
        if not isinstance(message, dict):
            yield Finding("wrong_type", "a message must be an object", at)
            return
        broken = False
        for finding in check_message(message, at):
            broken |= finding.severity == "error"
            yield finding
        if broken:
            return  # what follows from the order of broken messages says nothing
        yield from grammar.step(message, at)


def check_message(message: Row, at: str) -> Iterator[Finding]:
    role = message.get("role")
    if role is None:
        yield Finding("missing_field", "a message needs a role", f"{at}.role")
    elif not isinstance(role, str):
        yield Finding("wrong_type", "role must be a string", f"{at}.role")
    elif role not in ROLES:
        yield Finding("bad_role", f"the roles are {', '.join(ROLES)}", f"{at}.role")
    content = message.get("content")
    if content is None:
        if not (role == "assistant" and message.get("tool_calls")):
            yield Finding("missing_field", "a message needs content", f"{at}.content")
    elif not isinstance(content, str) and not _is_text_parts(content):
        yield Finding(
            "wrong_type", "content must be a string or a list of text parts", f"{at}.content"
        )
    yield from _check_weight(message, role, at)
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        yield Finding("wrong_type", "name must be a string", f"{at}.name")
    if message.get("tool_calls") is not None:
        yield from _check_calls(message["tool_calls"], role, f"{at}.tool_calls")


def _check_weight(message: Row, role: Any, at: str) -> Iterator[Finding]:
    weight = message.get("weight")
    if weight is None:
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        yield Finding("bad_weight", "weight must be a number from 0 to 1", f"{at}.weight")
    elif role != "assistant":
        yield Finding("bad_weight", "only an assistant's weight counts", f"{at}.weight", "warning")


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


class _Grammar:
    """Who may speak after whom, one message at a time."""

    def __init__(self, tools: frozenset[str] | None) -> None:
        self._tools = tools
        self._before: str | None = None
        self._open: set[str] = set()  # ids of calls without an answer

    def step(self, message: Row, at: str) -> Iterator[Finding]:
        role = message["role"]
        if role == "tool":
            yield from self._answer(message, at)
        elif self._open:
            yield Finding(
                "tool_call_mismatch", f"{len(self._open)} tool calls before it have no answer", at
            )
            self._open.clear()
        if role in ("system", "developer") and self._before not in (None, "system", "developer"):
            yield Finding("bad_role_order", f"a {role} message after the start", at, "warning")
        if role == self._before and role in ("user", "assistant"):
            yield Finding(
                "bad_role_order",
                f"two {role} messages in a row; many templates refuse them",
                at,
                "warning",
            )
        for i, call in enumerate(message.get("tool_calls") or ()):
            yield from self._call(call, f"{at}.tool_calls.{i}")
        self._before = role

    def _answer(self, message: Row, at: str) -> Iterator[Finding]:
        if self._before not in ("assistant", "tool"):
            yield Finding("bad_role_order", "a tool answers an assistant's call", at)
            return
        answered = message.get("tool_call_id")
        if answered is None and len(self._open) == 1:
            self._open.clear()  # one call, one answer: nothing to confuse
        elif not isinstance(answered, str) or answered not in self._open:
            yield Finding(
                "tool_call_mismatch", "it answers no open tool call", f"{at}.tool_call_id"
            )
        else:
            self._open.discard(answered)

    def _call(self, call: Row, at: str) -> Iterator[Finding]:
        if self._tools is not None and call["function"]["name"] not in self._tools:
            yield Finding(
                "tool_call_mismatch",
                "it calls a function that tools does not declare",
                f"{at}.function.name",
            )
        self._open.add(str(call.get("id") or at))


# Tools


def check_tools(tools: Any) -> Iterator[Finding]:
    if tools is None:
        return
    if not isinstance(tools, list):
        yield Finding("bad_tool_schema", "tools must be a list", "tools")
        return
    for i, tool in enumerate(tools):
        at = f"tools.{i}"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            yield Finding(
                "bad_tool_schema", "a tool is an object with type function and a function", at
            )
        elif not isinstance(function.get("name"), str) or not function["name"]:
            yield Finding("bad_tool_schema", "a function needs a name", f"{at}.function.name")
        elif not isinstance(function.get("parameters") or {}, dict):
            yield Finding(
                "bad_tool_schema", "parameters must be a JSON Schema", f"{at}.function.parameters"
            )


def declared(tools: Any) -> frozenset[str] | None:
    if not isinstance(tools, list):
        return None
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return frozenset(name for name in names if isinstance(name, str)) if tools else None


def _check_calls(calls: Any, role: Any, at: str) -> Iterator[Finding]:
    if not isinstance(calls, list):
        yield Finding("bad_tool_schema", "tool_calls must be a list", at)
        return
    if calls and role != "assistant":
        yield Finding("bad_tool_schema", "only an assistant calls tools", at)
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            yield Finding("bad_tool_schema", "a call needs a function with a name", f"{at}.{i}")
        elif _arguments(function.get("arguments")) is None:
            yield Finding(
                "bad_tool_schema",
                "arguments must be an object, or a string of JSON that is one",
                f"{at}.{i}.function.arguments",
            )


def _arguments(value: Any) -> dict[str, Any] | None:
    """A call's arguments as an object; None when they are not one."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _normal_message(message: Row) -> Row:
    made = {key: value for key, value in message.items() if value is not None}
    content = made.get("content", "")
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    made["content"] = content
    if "tool_calls" in made:
        made["tool_calls"] = [_normal_call(call) for call in made["tool_calls"]]
    return made


def _normal_call(call: Row) -> Row:
    # Chat templates render arguments as an object; OpenAI's wire form is a string.
    function = {**call["function"], "arguments": _arguments(call["function"].get("arguments"))}
    return {**call, "function": function}


def normal_messages(messages: list[Row]) -> list[Row]:
    return [_normal_message(message) for message in messages]
