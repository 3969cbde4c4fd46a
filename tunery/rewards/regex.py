"""Whether a completion has a form: think first, then answer, say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Reward
from tunery.rewards._grading import each
from tunery.rewards._pattern import Pattern, compiled
from tunery.rewards._template import Template, render

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.entries import Grade, Sample


class RegexConfig(EntryConfig):
    pattern: Pattern = Field(
        description="Regular expression in Python's syntax; `.` also matches line breaks.",
    )
    input: Template = Field(
        "{{ sample.output_text }}", description="Template of the text to be judged."
    )
    full_match: bool = Field(
        False, description="The whole text must match, instead of some part of it."
    )
    match_reward: float = Field(1.0, ge=-100, le=100, description="Grade of a text that matches.")
    mismatch_reward: float = Field(
        0.0, ge=-100, le=100, description="Grade of a text that does not."
    )


class Regex:
    name: ClassVar[str] = "regex"
    title: ClassVar[str] = "Regular expression"
    summary: ClassVar[str] = "Rewards completions of a given form, such as <think>...</think>."
    paper: ClassVar[str | None] = (
        "DeepSeek-AI: DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement "
        "Learning, 2025, arXiv 2501.12948"
    )
    Config: ClassVar[type[EntryConfig]] = RegexConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "regex",
        "pattern": r"<think>.*?</think>\s*\S",
    }

    def templates(self, config: RegexConfig) -> Sequence[str]:
        return (config.input,)

    def grade(self, config: RegexConfig, samples: Sequence[Sample]) -> list[Grade]:
        """`match_reward` or `mismatch_reward` for each sample."""
        pattern = compiled(config.pattern)
        match = pattern.fullmatch if config.full_match else pattern.search
        return each(
            samples,
            lambda sample: (
                config.match_reward
                if match(render(config.input, sample))
                else config.mismatch_reward
            ),
        )


ENTRY: type[Reward] = Regex
