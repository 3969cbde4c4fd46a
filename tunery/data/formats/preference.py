"""preference: {"input": {"messages"}, "preferred_output", "non_preferred_output"}

Or {"prompt", "chosen", "rejected"}, which becomes the former.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunery.data.formats._base import Finding, Format, Row
from tunery.data.formats._messages import (
    check_message,
    check_messages,
    check_tools,
    declared,
    normal_messages,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


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
            spoken("user", prompt),
            spoken("assistant", chosen),
            spoken("assistant", rejected),
            ("prompt", "chosen", "rejected"),
            row.get("tools"),
        )


def spoken(role: str, value: Any) -> Any:
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


def _check(row: Row) -> Iterator[Finding]:
    parts = _Preference.of(row)
    if parts.prompt is None:
        yield Finding("missing_field", "a preference row needs input.messages", parts.paths[0])
        return
    yield from check_tools(parts.tools)
    broken = False
    prompt = check_messages(parts.prompt, parts.paths[0], declared(parts.tools))
    for findings in (
        prompt,
        check_output(parts.chosen, parts.paths[1]),
        check_output(parts.rejected, parts.paths[2]),
    ):
        for finding in findings:
            broken |= finding.severity == "error"
            yield finding
    if broken:
        return
    if normal_messages(parts.chosen) == normal_messages(parts.rejected):
        yield Finding(
            "identical_preference",
            "both replies are the same: nothing is preferred",
            parts.paths[2],
            "warning",
        )
    if parts.prompt[-1]["role"] == "assistant":
        yield Finding("bad_role_order", "the prompt ends with a reply", parts.paths[0], "warning")


def check_output(output: Any, path: str) -> Iterator[Finding]:
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
        for finding in check_message(output[0], f"{path}.0"):
            broken |= finding.severity == "error"
            yield finding
        if not broken and output[0]["role"] != "assistant":
            yield Finding("bad_role", "the reply must be an assistant's", f"{path}.0.role")


def _normal(row: Row) -> Row:
    parts = _Preference.of(row)
    spelled = {"prompt", "chosen", "rejected", "tools"} if row.get("chosen") is not None else set()
    made = {key: value for key, value in row.items() if key not in spelled and value is not None}
    prompt: Row = dict(made["input"]) if isinstance(made.get("input"), dict) else {}
    prompt["messages"] = normal_messages(parts.prompt)
    if parts.tools:
        prompt["tools"] = parts.tools
    made["input"] = prompt
    made["preferred_output"] = normal_messages(parts.chosen)
    made["non_preferred_output"] = normal_messages(parts.rejected)
    return made


def _features(row: Row) -> Iterator[str]:
    given: Mapping[str, Any] = row["input"]
    if given.get("tools"):
        yield "tools"
    if given["messages"][0]["role"] in ("system", "developer"):
        yield "system"
    if any(message["role"] == "assistant" for message in given["messages"]):
        yield "multi_turn"


FORMAT = Format(
    name="preference",
    task="text-generation",
    spellings=(
        frozenset({"input", "preferred_output", "non_preferred_output"}),
        frozenset({"prompt", "chosen", "rejected"}),
    ),
    check=_check,
    normal=_normal,
    content=("input", "preferred_output", "non_preferred_output"),
    features=_features,
    json_columns=frozenset(
        {"input", "preferred_output", "non_preferred_output", "chosen", "rejected"}
    ),
    answers=False,
)
