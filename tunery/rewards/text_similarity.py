"""OpenAI's `text_similarity`: how alike two texts are, from 0 to 1, by a metric of the field."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from tunery.entries import EntryConfig, Reward
from tunery.rewards._grading import each
from tunery.rewards._template import Template, render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tunery.entries import Grade, Sample

_REFUSED = {
    "cosine": "needs an embedding model",
    "meteor": "needs WordNet, which is not at hand offline",
    "gleu": "is not offered; bleu with smoothing is near to it",
}


class TextSimilarityConfig(EntryConfig):
    input: Template = Field(
        "{{ sample.output_text }}", description="Template of the text to be judged."
    )
    reference: Template = Field(description="Template of the text it should resemble.")
    evaluation_metric: Literal[
        "fuzzy_match",
        "bleu",
        "rouge_1",
        "rouge_2",
        "rouge_3",
        "rouge_4",
        "rouge_5",
        "rouge_l",
    ] = Field(
        "fuzzy_match",
        description="`fuzzy_match`: rapidfuzz's normalised indel similarity; `bleu`: sacrebleu's "
        "sentence BLEU; `rouge_N` and `rouge_l`: F1 of rouge-score.",
    )
    pass_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Grade 1 from this similarity on and 0 below; without it the similarity itself "
        "is the grade.",
    )

    @field_validator("evaluation_metric", mode="before")
    @classmethod
    def _offered(cls, value: Any) -> Any:
        if isinstance(value, str) and value in _REFUSED:
            raise ValueError(f"{value} {_REFUSED[value]}")
        return value


class TextSimilarity:
    name: ClassVar[str] = "text_similarity"
    title: ClassVar[str] = "Text similarity"
    summary: ClassVar[str] = "How alike a text and its reference are: edit distance, BLEU, ROUGE."
    paper: ClassVar[str | None] = (
        "Lin: ROUGE: A Package for Automatic Evaluation of Summaries, 2004; Post: A Call for "
        "Clarity in Reporting BLEU Scores, 2018, arXiv 1804.08771"
    )
    Config: ClassVar[type[EntryConfig]] = TextSimilarityConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "text_similarity",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.reference }}",
        "evaluation_metric": "fuzzy_match",
    }

    def templates(self, config: TextSimilarityConfig) -> Sequence[str]:
        return config.input, config.reference

    def grade(self, config: TextSimilarityConfig, samples: Sequence[Sample]) -> list[Grade]:
        """A similarity in 0..1 for each sample, or whether it reaches the threshold."""
        measure = _metric(config.evaluation_metric)

        def score(sample: Sample) -> float:
            alike = measure(render(config.input, sample), render(config.reference, sample))
            if config.pass_threshold is None:
                return alike
            return float(alike >= config.pass_threshold)

        return each(samples, score)


@lru_cache
def _metric(name: str) -> Callable[[str, str], float]:
    """(text, reference) to 0..1."""
    if name == "fuzzy_match":
        from rapidfuzz.fuzz import ratio

        return lambda text, reference: ratio(text, reference) / 100
    if name == "bleu":
        return _bleu()
    return _rouge("rougeL" if name == "rouge_l" else name.replace("_", ""))


def _bleu() -> Callable[[str, str], float]:
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)  # else a reply of three words could never score
    return lambda text, reference: float(bleu.sentence_score(text, [reference]).score) / 100


def _rouge(kind: str) -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    return lambda text, reference: float(scorer.score(reference, text)[kind].fmeasure)


ENTRY: type[Reward] = TextSimilarity
