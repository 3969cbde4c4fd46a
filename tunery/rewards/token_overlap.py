"""Words that an answer shares with the gold one: SQuAD's F1 and exact match, as a reward."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import EntryConfig, Reward
from tunery.rewards._grading import each
from tunery.rewards._template import Template, render
from tunery.rewards._verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.entries import Grade, Sample

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TokenOverlapConfig(EntryConfig):
    reference: Template = Field("{{ item.answer }}", description="Template of the gold answer.")
    input: Template = Field(
        "{{ sample.output_text }}", description="Template of the text to be judged."
    )
    measure: Literal["f1", "exact_match"] = Field(
        "f1", description="F1 over words, or 1 where all of them agree in order."
    )
    open_marker: str | None = Field(
        None, min_length=1, description="What the answer comes after; null where it comes first."
    )
    close_marker: str | None = Field(
        None, min_length=1, description="What closes the answer; null: the whole text is it."
    )
    unparsable: float = Field(
        0.0, ge=-100, le=100, description="Grade of a text that lacks a marker."
    )


class TokenOverlap:
    name: ClassVar[str] = "token_overlap"
    title: ClassVar[str] = "Token overlap"
    summary: ClassVar[str] = "Rewards short answers by the words they share with the gold one."
    paper: ClassVar[str | None] = (
        "Rajpurkar et al.: SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016, "
        "arXiv 1606.05250"
    )
    Config: ClassVar[type[EntryConfig]] = TokenOverlapConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "token_overlap",
        "reference": "{{ item.answer }}",
    }

    def templates(self, config: TokenOverlapConfig) -> Sequence[str]:
        return config.input, config.reference

    def grade(self, config: TokenOverlapConfig, samples: Sequence[Sample]) -> list[Grade]:
        """A number in 0..1, or `unparsable`, for each sample."""

        def score(sample: Sample) -> float:
            said = verdict(render(config.input, sample), config.open_marker, config.close_marker)
            if said is None:
                return config.unparsable
            given, gold = words(said), words(render(config.reference, sample))
            return float(given == gold) if config.measure == "exact_match" else _f1(given, gold)

        return each(samples, score)


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD compares answers."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(given: list[str], gold: list[str]) -> float:
    if not given or not gold:
        return float(given == gold)
    shared = sum((Counter(given) & Counter(gold)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(given), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


ENTRY: type[Reward] = TokenOverlap
