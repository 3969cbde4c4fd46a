"""`{{ item.answer }}` and `{{ sample.output_text }}`: what a grader is shown.

Paths only, as in OpenAI's graders: no filters, no calls, nothing to escape from. `item` is the row
of the data file; `sample` is the completion, as `output_text` or, read as JSON, `output_json`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from tunery.errors import InvalidData

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunery.entries import Sample

_PLACE = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*")
_STEP = re.compile(r"\w+")
SAMPLE_FIELDS = ("output_text", "output_json")


class SampleError(ValueError):
    """The completion has not what the template asks for: the model's doing, not the caller's."""


def check_template(source: str) -> str:
    """Return `source` if each of its places is a path from `item` or `sample`.

    Raises:
        ValueError: a place that is not; says what it could be.
    """
    for path in paths(source):
        if not _PATH.fullmatch(path):
            raise ValueError(f"{{{{ {path} }}}} is not a path such as item.answer")
        root, *steps = _STEP.findall(path)
        if root not in ("item", "sample"):
            raise ValueError(f"{{{{ {path} }}}} begins with neither item nor sample")
        if not steps:
            raise ValueError(f"{{{{ {path} }}}} names no field")
        if root == "sample" and steps[0] not in SAMPLE_FIELDS:
            raise ValueError(f"sample has {' and '.join(SAMPLE_FIELDS)}, no {steps[0]}")
        if steps[0] == "output_text" and root == "sample" and len(steps) > 1:
            raise ValueError("sample.output_text is a text and has no fields; use output_json")
    rest = _PLACE.sub("", source)
    if "{{" in rest or "}}" in rest:
        raise ValueError("a {{ without its }}, or the other way round")
    return source


Template = Annotated[str, AfterValidator(check_template)]
"""A checked template, as a field of a grader's `Config`."""


def paths(source: str) -> Iterator[str]:
    """What stands between the braces, in order."""
    return (match.group(1) for match in _PLACE.finditer(source))


def check_item(source: str, item: Mapping[str, Any]) -> None:
    """Let a row pass that has all that the template asks of it.

    Raises:
        InvalidData: it lacks a field; names the field and those at hand.
    """
    for path in paths(source):
        root, *steps = _STEP.findall(path)
        if root == "item":
            _from_item(item, steps, path)


def render(source: str, sample: Sample) -> str:
    """The template with its places filled. Texts stand as they are, all else as JSON.

    Raises:
        InvalidData: the row lacks a field.
        SampleError: the completion is not the JSON that the template asks for.
    """
    return _PLACE.sub(lambda match: _text(_look_up(match.group(1), sample)), source)


def _look_up(path: str, sample: Sample) -> Any:
    root, first, *steps = _STEP.findall(path)
    if root == "item":
        return _from_item(sample.item, [first, *steps], path)
    if first == "output_text":
        return sample.output_text
    try:
        return _walk(json.loads(sample.output_text), steps)
    except (ValueError, RecursionError) as error:
        raise SampleError("the completion is not JSON") from error
    except LookupError as error:
        raise SampleError(f"the completion's JSON has no {'.'.join(steps)}") from error


def _from_item(item: Mapping[str, Any], steps: list[str], path: str) -> Any:
    try:
        return _walk(item, steps)
    except LookupError as error:
        raise InvalidData(
            f"the grader's template asks for {path}; the row has {', '.join(sorted(item))}",
            code="template_error",
            hint="every row of the file needs the fields that the grader names",
        ) from error


def _walk(value: Any, steps: list[str]) -> Any:
    """Raises: LookupError: there is no such place."""
    for step in steps:
        if isinstance(value, list) and step.isdecimal():
            value = value[int(step)]
        elif isinstance(value, dict):
            value = value[step]
        else:
            raise LookupError(step)
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
