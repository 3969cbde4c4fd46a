"""Scores of generated texts against true ones, by the libraries of the field.

rouge-score (Google) and sacrebleu (Post, 2018, arXiv 1804.08771) are imported where they are used.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
_WORDS = re.compile(r"\w+")


def exact_match(truths: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of texts that are equal but for blanks at either end, 0..1.

    Raises:
        ValueError: no texts, or the two differ in number.
    """
    _check(truths, predictions)
    equal = (a.strip() == b.strip() for a, b in zip(truths, predictions, strict=True))
    return sum(equal) / len(truths)


def rouge(
    truths: Sequence[str], predictions: Sequence[str], names: Sequence[str]
) -> dict[str, float]:
    """Means over texts of F1 in n-grams or in the longest common subsequence of words, 0..1.

    Words are runs of letters and digits in any script, in lower case, without stemming: for plain
    English what rouge-score's own tokenizer finds, which drops all other letters.

    Args:
        names: of `ROUGE`.

    Raises:
        ValueError: no texts, or the two differ in number.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(truths, predictions)
    kinds = [ROUGE[name] for name in names]
    scorer = RougeScorer(kinds, tokenizer=_Words())
    scores = [scorer.score(a, b) for a, b in zip(truths, predictions, strict=True)]
    return {
        name: sum(score[kind].fmeasure for score in scores) / len(scores)
        for name, kind in zip(names, kinds, strict=True)
    }


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def bleu(truths: Sequence[str], predictions: Sequence[str]) -> float:
    """Corpus BLEU, 0..100, with sacrebleu's defaults: 13a tokens, exponential smoothing.

    Raises:
        ValueError: no texts, or the two differ in number.
    """
    from sacrebleu.metrics.bleu import BLEU

    _check(truths, predictions)
    return float(BLEU().corpus_score(list(predictions), [list(truths)]).score)


def chrf(truths: Sequence[str], predictions: Sequence[str]) -> float:
    """Corpus chrF2, 0..100: F of character 6-grams, for any script.

    Raises:
        ValueError: no texts, or the two differ in number.
    """
    from sacrebleu.metrics.chrf import CHRF

    _check(truths, predictions)
    return float(CHRF().corpus_score(list(predictions), [list(truths)]).score)


def _check(truths: Sequence[str], predictions: Sequence[str]) -> None:
    if len(truths) != len(predictions):
        raise ValueError(f"{len(truths)} truths against {len(predictions)} predictions")
    if not truths:
        raise ValueError("no texts to score")
