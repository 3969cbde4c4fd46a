"""Ranks and thresholds, worked out by hand."""

from __future__ import annotations

import math

import pytest

from tunery.evaluation.ranking import best_f1, mrr, ndcg, recall


def test_ranks_by_hand() -> None:
    ranks = [1, 3, 11]
    assert ndcg(ranks) == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert mrr(ranks) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert recall(ranks, 1) == pytest.approx(1 / 3)
    assert recall(ranks, 10) == pytest.approx(2 / 3)


def test_the_best_threshold_by_hand() -> None:
    best = best_f1([True, False, True, False], [0.9, 0.8, 0.7, 0.1])
    # One of one: 2/3. Two of three: 4/5. All four: 4/6.
    assert best.f1 == pytest.approx(4 / 5)
    assert best.threshold == 0.7


def test_equal_scores_are_called_together() -> None:
    best = best_f1([True, False], [0.5, 0.5])
    assert (best.f1, best.threshold) == (pytest.approx(2 / 3), 0.5)


def test_nothing_true_has_no_threshold() -> None:
    assert best_f1([False, False], [0.5, 0.2]).threshold == math.inf
    with pytest.raises(ValueError, match="nothing to rank"):
        ndcg([])
