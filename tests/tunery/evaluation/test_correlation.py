"""Errors and correlations, by hand and as scipy and scikit-learn have them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tunery.evaluation.classification import label_sets
from tunery.evaluation.correlation import (
    mean_absolute_error,
    mean_squared_error,
    pearson,
    spearman,
)


def test_errors_by_hand() -> None:
    assert mean_squared_error([1, 2, 3], [1, 4, 2]) == pytest.approx(5 / 3)
    assert mean_absolute_error([1, 2, 3], [1, 4, 2]) == pytest.approx(1.0)


def test_correlations_by_hand() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4], [1, 10, 100, 90]) == pytest.approx(0.8)
    assert pearson([1, 1, 1], [1, 2, 3]) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_scipys_ties_included(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truths, said = draw.integers(0, 5, 40).tolist(), draw.integers(0, 9, 40).tolist()
    assert pearson(truths, said) == pytest.approx(stats.pearsonr(truths, said)[0], abs=1e-12)
    assert spearman(truths, said) == pytest.approx(stats.spearmanr(truths, said)[0], abs=1e-12)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="no examples"):
        pearson([], [])
    with pytest.raises(ValueError, match="1 truths against 2"):
        mean_squared_error([1], [1, 2])


def test_label_sets_by_hand() -> None:
    scores = label_sets([{0, 1}, {2}, set()], [{0}, {2, 1}, set()], 4)
    # Hits 2; given 3 and 3. Class 0 and 2 are right, 1 never, 3 does not occur.
    assert scores.micro_f1 == pytest.approx(4 / 6)
    assert scores.macro_f1 == pytest.approx(2 / 4)
    assert scores.subset_accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_label_sets_are_scored_as_by_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(seed)
    truths, said = (draw.random((2, 30, 5)) < 0.3).astype(int)
    ours = label_sets(*[[set(row.nonzero()[0].tolist()) for row in m] for m in (truths, said)], 5)
    for average, value in (("micro", ours.micro_f1), ("macro", ours.macro_f1)):
        theirs = metrics.f1_score(truths, said, average=average, zero_division=0)
        assert value == pytest.approx(theirs)
    assert ours.subset_accuracy == pytest.approx(metrics.accuracy_score(truths, said))
