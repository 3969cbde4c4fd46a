"""Scores of texts: by hand, and as the libraries' own functions give them."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from tunery.evaluation.generation import bleu, chrf, exact_match, rouge

TRUE = ["the cat sat on the mat", "a dog barked"]
SAID = ["the cat lay on the mat", "a dog barked"]


def test_rouge_by_hand() -> None:
    scores = rouge(TRUE, SAID, ["rouge_1", "rouge_2", "rouge_l"])
    assert scores == {
        "rouge_1": pytest.approx((5 / 6 + 1) / 2),
        "rouge_2": pytest.approx((3 / 5 + 1) / 2),
        "rouge_l": pytest.approx((5 / 6 + 1) / 2),
    }


def test_rouge_of_english_is_that_of_its_library() -> None:
    scorer = RougeScorer(["rougeL"])
    theirs = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(TRUE, SAID, strict=True)]
    assert rouge(TRUE, SAID, ["rouge_l"])["rouge_l"] == pytest.approx(sum(theirs) / 2)


def test_rouge_reads_every_script() -> None:
    assert rouge(["Добрый день"], ["добрый вечер"], ["rouge_1"])["rouge_1"] == pytest.approx(0.5)


def test_bleu_and_chrf_are_whole_at_equality_and_none_without_overlap() -> None:
    assert bleu(TRUE, TRUE) == pytest.approx(100)
    assert chrf(TRUE, TRUE) == pytest.approx(100)
    assert bleu(["abc def"], ["xyz"]) == pytest.approx(0)
    assert chrf(["abc"], ["xyz"]) == pytest.approx(0)


def test_bleu_by_hand() -> None:
    # Precisions 5/6, 3/5, 1/4 and, smoothed, (1/2)/3: their geometric mean; lengths are equal.
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    assert bleu(TRUE[:1], SAID[:1]) == pytest.approx(expected)


def test_exact_match_forgives_blanks_at_the_ends() -> None:
    assert exact_match(["a b", "c"], ["a b ", "C"]) == 0.5
    with pytest.raises(ValueError, match="no texts"):
        exact_match([], [])
