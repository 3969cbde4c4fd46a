"""Agreement of a written verdict with the gold label, for classification by a language model.

unparsable (no closing marker, no label, two labels)   -3
right                                                  +1
wrong                                                  -1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.entries import EntryConfig, Reward
from tunery.errors import InvalidData
from tunery.rewards._grading import each
from tunery.rewards._template import Template, render
from tunery.rewards._verdict import labels_in, verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.entries import Grade, Sample


class LabelMatchConfig(EntryConfig):
    labels: tuple[str, ...] = Field(
        min_length=2,
        max_length=1000,
        description="All labels, as the model is to write them.",
    )
    reference: Template = Field("{{ item.label }}", description="Template of the gold label.")
    input: Template = Field(
        "{{ sample.output_text }}", description="Template of the text to be judged."
    )
    open_marker: str | None = Field(
        None,
        min_length=1,
        description="What the verdict comes after; null where it begins the completion.",
    )
    close_marker: str | None = Field(
        None,
        min_length=1,
        description="What closes the verdict; a text without it is unparsable. Null: the whole "
        "text is the verdict.",
    )
    correct: float = Field(1.0, ge=-100, le=100, description="Grade of the gold label.")
    incorrect: float = Field(-1.0, ge=-100, le=100, description="Grade of another label.")
    unparsable: float = Field(
        -3.0, ge=-100, le=100, description="Grade of a text that names no label, or several."
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> LabelMatchConfig:
        if len({label.casefold() for label in self.labels}) != len(self.labels):
            raise ValueError("labels: two of them differ in case only, or not at all")
        if not all(label.strip() for label in self.labels):
            raise ValueError("labels: one of them is empty")
        return self


class LabelMatch:
    name: ClassVar[str] = "label_match"
    title: ClassVar[str] = "Label match"
    summary: ClassVar[str] = "Rewards a verdict that can be read and is the gold label."
    paper: ClassVar[str | None] = (
        "Hu et al.: Improving the Language Understanding Capabilities of Large Language Models "
        "Using Reinforcement Learning, 2024, arXiv 2410.11020"
    )
    Config: ClassVar[type[EntryConfig]] = LabelMatchConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "label_match",
        "labels": ["spam", "ham"],
        "reference": "{{ item.label }}",
    }

    def templates(self, config: LabelMatchConfig) -> Sequence[str]:
        return config.input, config.reference

    def grade(self, config: LabelMatchConfig, samples: Sequence[Sample]) -> list[Grade]:
        """`correct`, `incorrect` or `unparsable` for each sample.

        Raises:
            InvalidData: a row's gold label is none of `labels`.
        """
        by_fold = {label.casefold(): label for label in config.labels}

        def score(sample: Sample) -> float:
            gold = by_fold.get(render(config.reference, sample).strip().casefold())
            if gold is None:
                raise InvalidData(
                    f"a row's gold label is none of the grader's {len(config.labels)} labels",
                    hint="list every label of the data in the grader's `labels`",
                )
            said = verdict(render(config.input, sample), config.open_marker, config.close_marker)
            found = labels_in(said, config.labels) if said is not None else set()
            if len(found) != 1:
                return config.unparsable
            return config.correct if found == {gold} else config.incorrect

        return each(samples, score)


ENTRY: type[Reward] = LabelMatch
