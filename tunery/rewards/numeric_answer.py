"""The number that a solution ends in, as in grade-school mathematics (gsm8k).

The answer stands after a marker (`####`) or, without one, is the last number of the text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Reward
from tunery.errors import InvalidData
from tunery.rewards._grading import each
from tunery.rewards._template import Template, render

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.entries import Grade, Sample

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?")


class NumericAnswerConfig(EntryConfig):
    input: Template = Field(
        "{{ sample.output_text }}", description="Template of the text that holds the answer."
    )
    reference: Template = Field(
        description="Template of the text that holds the right answer, read the same way."
    )
    marker: str | None = Field(
        "####",
        min_length=1,
        max_length=64,
        description="Where a text has it, the answer is the first number after its last "
        "occurrence; elsewhere, or with null, the last number of the text.",
    )
    marker_required: bool = Field(
        False, description="A completion without the marker has no answer."
    )
    tolerance: float = Field(
        1e-6, ge=0, le=1, description="Relative difference at which two numbers are the same."
    )
    correct: float = Field(1.0, ge=-100, le=100, description="Grade of the right number.")
    incorrect: float = Field(0.0, ge=-100, le=100, description="Grade of another number.")
    unparsable: float = Field(0.0, ge=-100, le=100, description="Grade of a text without one.")


class NumericAnswer:
    name: ClassVar[str] = "numeric_answer"
    title: ClassVar[str] = "Numeric answer"
    summary: ClassVar[str] = "Compares the number that a solution ends in with the right one."
    paper: ClassVar[str | None] = (
        "Cobbe et al.: Training Verifiers to Solve Math Word Problems, 2021, arXiv 2110.14168"
    )
    Config: ClassVar[type[EntryConfig]] = NumericAnswerConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "numeric_answer",
        "reference": "{{ item.answer }}",
    }

    def templates(self, config: NumericAnswerConfig) -> Sequence[str]:
        return config.input, config.reference

    def grade(self, config: NumericAnswerConfig, samples: Sequence[Sample]) -> list[Grade]:
        """`correct`, `incorrect` or `unparsable` for each sample.

        Raises:
            InvalidData: a row's reference holds no number.
        """

        def score(sample: Sample) -> float:
            right = answer(render(config.reference, sample), config.marker)
            if right is None:
                raise InvalidData(
                    "a row's reference holds no number", hint="look at the grader's `reference`"
                )
            text = render(config.input, sample)
            missing = config.marker_required and config.marker and config.marker not in text
            given = None if missing else answer(text, config.marker)
            if given is None:
                return config.unparsable
            same = abs(given - right) <= config.tolerance * max(1.0, abs(right))
            return config.correct if same else config.incorrect

        return each(samples, score)


def answer(text: str, marker: str | None) -> float | None:
    """The number that a text answers with; None where there is none.

    Thousands may be grouped by commas. A percent sign is read over: 5% is 5.
    """
    if marker is not None and marker in text:
        found = numbers(text.rpartition(marker)[2])
        return found[0] if found else None
    found = numbers(text)
    return found[-1] if found else None


def numbers(text: str) -> list[float]:
    """All numbers of a text, in order. A minus counts where no digit or letter stands before it."""
    found = []
    for match in _NUMBER.finditer(text):
        word = match.group().rstrip("%").replace(",", "")
        if not any(c.isdigit() for c in word):
            continue
        start = match.start()
        before = text[start - 1] if start else " "
        if word[0] in "+-" and before.isalnum():
            word = word[1:]  # "7-3", "GPT-4": a dash, not a sign
        try:
            value = float(word)
        except ValueError:
            continue
        if abs(value) != float("inf"):
            found.append(value)
    return found


ENTRY: type[Reward] = NumericAnswer
