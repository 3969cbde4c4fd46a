"""The shapes that a row may have: which one it is, whether it is sound, and its one normal form.

    chat               {"messages": [{"role", "content", "weight"?, ...}], "tools"?}
    prompt_completion  {"prompt", "completion"}
    text               {"text"}
    preference         {"input": {"messages"}, "preferred_output", "non_preferred_output"}
                       or {"prompt", "chosen", "rejected"}, which becomes the former
    classification     {"text", "label"}, or "labels"; the label becomes a string

Other columns stay in the row: prompt templates may use them. No message quotes a row, and no path
names a key that is not ours: either may be somebody's secret.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tunery.entries import DataFormat

Row = dict[str, Any]
Severity = Literal["error", "warning", "note"]

ROLES = ("system", "developer", "user", "assistant", "tool")
LABEL_LIMIT = 256
"""Characters of a label."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to be said of one row. `path` is dotted, from the row's root."""

    code: str
    message: str
    path: str | None = None
    severity: Severity = "error"


@dataclass(frozen=True, slots=True)
class Format:
    """One of the shapes.

    Attributes:
        spellings: sets of columns of which one must be there, whole.
        check: the findings on a row that has them.
        normal: the row's normal form, if no finding is an error.
        features: what is remarkable about a normal row, in a word each.
    """

    name: DataFormat
    spellings: tuple[frozenset[str], ...]
    check: Callable[[Row], Iterable[Finding]]
    normal: Callable[[Row], Row]
    content: tuple[str, ...]
    """Columns of the normal form that say what is learnt; the others may differ in a duplicate."""
    features: Callable[[Row], Iterable[str]] = lambda row: ()

    def fits(self, columns: frozenset[str]) -> frozenset[str] | None:
        """The spelling that is there."""
        return next((spelling for spelling in self.spellings if spelling <= columns), None)


def detect(row: Row) -> Format | Finding:
    """The format of a row, or why it has none."""
    columns = _columns(row)
    matches = [(form, used) for form in FORMATS.values() if (used := form.fits(columns))]
    # What is part of another match is no match of its own: text and label is not text.
    whole = [form for form, used in matches if not any(used < other for _, other in matches)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        names = " and of ".join(form.name for form in whole)
        return Finding("mixed_formats", f"a row with the columns of {names}; keep those of one")
    for form in FORMATS.values():
        if any(spelling & columns for spelling in form.spellings):
            return _lacks(form, columns)
    known = "; ".join(f"{form.name}: {_spelled(form)}" for form in FORMATS.values())
    return Finding("unknown_format", f"no known format has these columns. Known are {known}")


def check(row: Row, expected: Format) -> Iterator[Finding]:
    """What is wrong, or noteworthy, with a row of a file in that format."""
    columns = _columns(row)
    if expected.fits(columns) is None:
        found = detect(row)
        # A row that merely lacks a column is of this format still.
        if isinstance(found, Format) and not _is_part(found, expected):
            yield Finding("mixed_formats", f"a {found.name} row in a file of {expected.name} rows")
        elif isinstance(found, Finding) and found.code == "unknown_format" and columns:
            yield found
        else:
            yield _lacks(expected, columns)
        return
    yield from expected.check(row)


def _columns(row: Row) -> frozenset[str]:
    return frozenset(key for key, value in row.items() if value is not None)


def _is_part(small: Format, large: Format) -> bool:
    return any(a < b for a in small.spellings for b in large.spellings)


def _spelled(form: Format) -> str:
    return " or ".join(", ".join(sorted(spelling)) for spelling in form.spellings)


def _lacks(form: Format, columns: frozenset[str]) -> Finding:
    nearest = max(form.spellings, key=lambda spelling: len(spelling & columns))
    missing = sorted(nearest - columns)
    return Finding("missing_field", f"a {form.name} row needs {', '.join(missing)}", missing[0])


# Messages


def _check_messages(messages: Any, path: str, tools: frozenset[str] | None) -> Iterator[Finding]:
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
        for finding in _check_message(message, at):
            broken |= finding.severity == "error"
            yield finding
        if broken:
            return  # what follows from the order of broken messages says nothing
        yield from grammar.step(message, at)


def _check_message(message: Row, at: str) -> Iterator[Finding]:
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
    if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
        yield Finding("bad_weight", "weight must be the integer 0 or 1", f"{at}.weight")
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


def _check_tools(tools: Any) -> Iterator[Finding]:
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


def _declared(tools: Any) -> frozenset[str] | None:
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


# Chat


def _check_chat(row: Row) -> Iterator[Finding]:
    yield from _check_tools(row.get("tools"))
    messages = row["messages"]
    broken = False
    for finding in _check_messages(messages, "messages", _declared(row.get("tools"))):
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


def _normal_messages(messages: list[Row]) -> list[Row]:
    return [_normal_message(message) for message in messages]


def _normal_chat(row: Row) -> Row:
    made = {key: value for key, value in row.items() if value is not None}
    made["messages"] = _normal_messages(row["messages"])
    return made


def _chat_features(row: Row) -> Iterator[str]:
    messages = row["messages"]
    if row.get("tools"):
        yield "tools"
    if messages[0]["role"] in ("system", "developer"):
        yield "system"
    if any("weight" in message for message in messages):
        yield "weights"
    if sum(message["role"] == "assistant" for message in messages) > 1:
        yield "multi_turn"


# Prompt and completion, text, classification


def _check_strings(*columns: str) -> Callable[[Row], Iterator[Finding]]:
    """Each column a string, the last one, which is learnt, not an empty one."""

    def checked(row: Row) -> Iterator[Finding]:
        wrong = [column for column in columns if not isinstance(row[column], str)]
        for column in wrong:
            yield Finding("wrong_type", f"{column} must be a string", column)
        if not wrong and not row[columns[-1]].strip():
            yield Finding("no_trainable_tokens", f"{columns[-1]} is empty", columns[-1], "warning")

    return checked


def _check_classification(row: Row) -> Iterator[Finding]:
    yield from _check_strings("text")(row)
    column = "label" if row.get("label") is not None else "labels"
    label = row[column]
    if isinstance(label, bool) or not isinstance(label, str | int):
        yield Finding("wrong_type", f"{column} must be a string or an integer", column)
    elif label == "":
        yield Finding("missing_field", f"{column} is empty", column)
    elif isinstance(label, str) and len(label) > LABEL_LIMIT:
        yield Finding("wrong_type", f"{column} has more than {LABEL_LIMIT} characters", column)


def _normal_classification(row: Row) -> Row:
    made = {key: value for key, value in row.items() if key != "labels" and value is not None}
    label = row["label"] if row.get("label") is not None else row["labels"]
    made["label"] = str(label)
    return made


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Labels in id order: by number where all are whole numbers, else by code point."""
    found = set(labels)
    if all(label.removeprefix("-").isdecimal() and label.isascii() for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)


# Preference


@dataclass(frozen=True, slots=True)
class _Preference:
    """The parts of a preference row, whichever way it is spelled, each with its path."""

    prompt: Any
    chosen: Any
    rejected: Any
    paths: tuple[str, str, str]
    tools: Any

    @staticmethod
    def of(row: Row) -> _Preference:
        if row.get("chosen") is None:
            given = row["input"]
            prompt = given.get("messages") if isinstance(given, dict) else None
            tools = given.get("tools") if isinstance(given, dict) else None
            paths = ("input.messages", "preferred_output", "non_preferred_output")
            return _Preference(prompt, row[paths[1]], row[paths[2]], paths, tools)
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        shared = _shared(prompt, chosen, rejected)
        if shared is not None:
            prompt, chosen, rejected = shared, chosen[-1:], rejected[-1:]
        return _Preference(
            _spoken("user", prompt),
            _spoken("assistant", chosen),
            _spoken("assistant", rejected),
            ("prompt", "chosen", "rejected"),
            row.get("tools"),
        )


def _spoken(role: str, value: Any) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _shared(prompt: Any, chosen: Any, rejected: Any) -> list[Row] | None:
    """The conversation that both replies repeat before they part, as some data sets have it."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)) or len(chosen) < 2:
        return None
    if chosen[:-1] != rejected[:-1]:
        return None
    before: list[Row] = chosen[:-1]
    if isinstance(prompt, list) and before[: len(prompt)] != prompt:
        return None
    return before


def _check_preference(row: Row) -> Iterator[Finding]:
    parts = _Preference.of(row)
    if parts.prompt is None:
        yield Finding("missing_field", "a preference row needs input.messages", parts.paths[0])
        return
    yield from _check_tools(parts.tools)
    broken = False
    prompt = _check_messages(parts.prompt, parts.paths[0], _declared(parts.tools))
    for findings in (
        prompt,
        _check_output(parts.chosen, parts.paths[1]),
        _check_output(parts.rejected, parts.paths[2]),
    ):
        for finding in findings:
            broken |= finding.severity == "error"
            yield finding
    if broken:
        return
    if _normal_messages(parts.chosen) == _normal_messages(parts.rejected):
        yield Finding(
            "identical_preference",
            "both replies are the same: nothing is preferred",
            parts.paths[2],
            "warning",
        )
    if parts.prompt[-1]["role"] == "assistant":
        yield Finding("bad_role_order", "the prompt ends with a reply", parts.paths[0], "warning")


def _check_output(output: Any, path: str) -> Iterator[Finding]:
    if not isinstance(output, list) or not all(isinstance(message, dict) for message in output):
        yield Finding("wrong_type", "a list with one assistant message is expected", path)
    elif not output:
        yield Finding("empty_messages", "one assistant message is expected", path)
    elif len(output) > 1:
        yield Finding(
            "bad_role_order", f"one assistant message is expected, not {len(output)}", path
        )
    else:
        broken = False
        for finding in _check_message(output[0], f"{path}.0"):
            broken |= finding.severity == "error"
            yield finding
        if not broken and output[0]["role"] != "assistant":
            yield Finding("bad_role", "the reply must be an assistant's", f"{path}.0.role")


def _normal_preference(row: Row) -> Row:
    parts = _Preference.of(row)
    spelled = {"prompt", "chosen", "rejected", "tools"} if row.get("chosen") is not None else set()
    made = {key: value for key, value in row.items() if key not in spelled and value is not None}
    prompt: Row = dict(made["input"]) if isinstance(made.get("input"), dict) else {}
    prompt["messages"] = _normal_messages(parts.prompt)
    if parts.tools:
        prompt["tools"] = parts.tools
    made["input"] = prompt
    made["preferred_output"] = _normal_messages(parts.chosen)
    made["non_preferred_output"] = _normal_messages(parts.rejected)
    return made


def _preference_features(row: Row) -> Iterator[str]:
    given: Mapping[str, Any] = row["input"]
    if given.get("tools"):
        yield "tools"
    if given["messages"][0]["role"] in ("system", "developer"):
        yield "system"
    if any(message["role"] == "assistant" for message in given["messages"]):
        yield "multi_turn"


def _as_it_is(row: Row) -> Row:
    return {key: value for key, value in row.items() if value is not None}


# In the order in which an incomplete row is taken for one of them.
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            "preference",
            (
                frozenset({"input", "preferred_output", "non_preferred_output"}),
                frozenset({"prompt", "chosen", "rejected"}),
            ),
            _check_preference,
            _normal_preference,
            ("input", "preferred_output", "non_preferred_output"),
            _preference_features,
        ),
        Format(
            "chat",
            (frozenset({"messages"}),),
            _check_chat,
            _normal_chat,
            ("messages", "tools"),
            _chat_features,
        ),
        Format(
            "prompt_completion",
            (frozenset({"prompt", "completion"}),),
            _check_strings("prompt", "completion"),
            _as_it_is,
            ("prompt", "completion"),
        ),
        Format(
            "classification",
            (frozenset({"text", "label"}), frozenset({"text", "labels"})),
            _check_classification,
            _normal_classification,
            ("text", "label"),
        ),
        Format("text", (frozenset({"text"}),), _check_strings("text"), _as_it_is, ("text",)),
    )
}
