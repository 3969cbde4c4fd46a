"""OpenAI's `string_check`: one text against another, right or wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import EntryConfig, Reward
from tunery.rewards._grading import each
from tunery.rewards._template import Template, render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tunery.entries import Grade, Sample

_OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


class StringCheckConfig(EntryConfig):
    input: Template = Field(
        "{{ sample.output_text }}", description="Template of the text to be judged."
    )
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        "eq",
        description="`eq` and `ne`: the same, or not. `like`: the input contains the reference; "
        "`ilike`: so, whatever the case.",
    )
    reference: Template = Field(description="Template of the text it is compared with.")


class StringCheck:
    name: ClassVar[str] = "string_check"
    title: ClassVar[str] = "String check"
    summary: ClassVar[str] = "1 where a text is, or contains, the reference, else 0."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = StringCheckConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "string_check",
        "input": "{{ sample.output_text }}",
        "operation": "eq",
        "reference": "{{ item.reference }}",
    }

    def templates(self, config: StringCheckConfig) -> Sequence[str]:
        return config.input, config.reference

    def grade(self, config: StringCheckConfig, samples: Sequence[Sample]) -> list[Grade]:
        """1.0 or 0.0 for each sample."""
        holds = _OPERATIONS[config.operation]
        return each(
            samples,
            lambda sample: float(
                holds(render(config.input, sample), render(config.reference, sample))
            ),
        )


ENTRY: type[Reward] = StringCheck
