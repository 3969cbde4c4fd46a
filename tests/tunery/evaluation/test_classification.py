"""Accuracy and F1, by hand and against scikit-learn."""

import random

import pytest
from sklearn.metrics import accuracy_score, f1_score

from tunery.evaluation.classification import accuracy, class_scores, macro_f1, weighted_f1

# Worked by hand. Truth a: 3, b: 2, c: 1. Predicted a: 2, b: 3, d: 1.
# a: TP 2 -> 4/5; b: TP 1 -> 2/5; c: never predicted -> 0; d: never true -> 0.
TRUTHS = ["a", "a", "a", "b", "b", "c"]
PREDICTIONS = ["a", "a", "b", "b", "d", "b"]


def test_the_hand_worked_example() -> None:
    assert accuracy(TRUTHS, PREDICTIONS) == 3 / 6
    assert {k: (s.f1, s.support) for k, s in class_scores(TRUTHS, PREDICTIONS).items()} == {
        "a": (4 / 5, 3),
        "b": (2 / 5, 2),
        "c": (0.0, 1),
        "d": (0.0, 0),
    }
    assert macro_f1(TRUTHS, PREDICTIONS) == pytest.approx((4 / 5 + 2 / 5) / 4)
    assert weighted_f1(TRUTHS, PREDICTIONS) == pytest.approx((3 * 4 / 5 + 2 * 2 / 5) / 6)


@pytest.mark.parametrize("seed", range(20))
def test_random_labels_score_as_in_scikit_learn(seed: int) -> None:
    rng = random.Random(seed)
    classes, n = rng.randint(1, 7), rng.randint(1, 60)
    truths = [rng.randrange(classes) for _ in range(n)]
    predictions = [rng.randrange(classes + 1) for _ in range(n)]
    assert accuracy(truths, predictions) == pytest.approx(accuracy_score(truths, predictions))
    for ours, average in ((macro_f1, "macro"), (weighted_f1, "weighted")):
        theirs = f1_score(truths, predictions, average=average, zero_division=0)
        assert ours(truths, predictions) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("metric", [accuracy, macro_f1, weighted_f1])
def test_nothing_to_score_and_unequal_lengths_are_refused(metric) -> None:
    with pytest.raises(ValueError, match="no examples"):
        metric([], [])
    with pytest.raises(ValueError, match="2 truths against 1"):
        metric([1, 2], [1])
