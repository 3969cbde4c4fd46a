"""Nearness of a written number to the gold one, for regression by a language model.

offset - |number - gold|, and -offset where no number can be read
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.entries import EntryConfig, Reward
from tunery.errors import InvalidData
from tunery.rewards._grading import each
from tunery.rewards._template import Template, render
from tunery.rewards._verdict import verdict
from tunery.rewards.numeric_answer import numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.entries import Grade, Sample


class NumericDistanceConfig(EntryConfig):
    reference: Template = Field("{{ item.label }}", description="Template of the gold number.")
    input: Template = Field(
        "{{ sample.output_text }}", description="Template of the text to be judged."
    )
    open_marker: str | None = Field(
        None,
        min_length=1,
        description="What the verdict comes after; null where it begins the completion.",
    )
    close_marker: str | None = Field(
        None, min_length=1, description="What closes the verdict; null: the whole text is it."
    )
    offset: float = Field(
        2.5, gt=0, le=100, description="Grade of the gold number; its negative for no number."
    )
    range: tuple[float, float] = Field(
        (0.0, 5.0), description="Least and largest number; one outside counts as none."
    )

    @model_validator(mode="after")
    def _has_room(self) -> NumericDistanceConfig:
        if self.range[0] >= self.range[1]:
            raise ValueError("range: the least number must be below the largest")
        return self


class NumericDistance:
    name: ClassVar[str] = "numeric_distance"
    title: ClassVar[str] = "Numeric distance"
    summary: ClassVar[str] = "Rewards a number by how near it is to the gold one."
    paper: ClassVar[str | None] = (
        "Hu et al.: Improving the Language Understanding Capabilities of Large Language Models "
        "Using Reinforcement Learning, 2024, arXiv 2410.11020"
    )
    Config: ClassVar[type[EntryConfig]] = NumericDistanceConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "numeric_distance",
        "reference": "{{ item.score }}",
        "offset": 2.5,
        "range": [0, 5],
    }

    def templates(self, config: NumericDistanceConfig) -> Sequence[str]:
        return config.input, config.reference

    def grade(self, config: NumericDistanceConfig, samples: Sequence[Sample]) -> list[Grade]:
        """`offset - distance` for each sample, by the first number of its verdict.

        Raises:
            InvalidData: a row's gold number is none.
        """
        least, largest = config.range

        def score(sample: Sample) -> float:
            gold = numbers(render(config.reference, sample))
            if len(gold) != 1:
                raise InvalidData(
                    "a row's gold value is not a number", hint="look at the grader's `reference`"
                )
            said = verdict(render(config.input, sample), config.open_marker, config.close_marker)
            found = numbers(said) if said is not None else []
            if not found or not least <= found[0] <= largest:
                return -config.offset
            return config.offset - abs(found[0] - gold[0])

        return each(samples, score)


ENTRY: type[Reward] = NumericDistance
