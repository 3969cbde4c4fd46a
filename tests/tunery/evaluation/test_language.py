"""Sums that become loss, perplexity and token accuracy."""

import math

import pytest
from sklearn.metrics import log_loss

from tunery.evaluation.language import TokenTotals, perplexity


def test_totals_of_parts_are_the_totals_of_the_whole() -> None:
    whole = TokenTotals(3.0, 3.0, 3, 1) + TokenTotals(1.0, 1.0, 1, 1)
    assert whole.loss == 1.0  # the mean over four tokens, not the mean of two means
    assert whole.perplexity == pytest.approx(math.e)
    assert whole.token_accuracy == 0.5


def test_loss_is_the_mean_log_loss() -> None:
    probabilities = [[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]]
    truth = [0, 1, 1]
    nll = -sum(math.log(row[y]) for row, y in zip(probabilities, truth, strict=True))
    assert TokenTotals(nll, 3.0, 3, 2).loss == pytest.approx(log_loss(truth, probabilities))


def test_weights_shift_the_loss_and_leave_accuracy_alone() -> None:
    weighted = TokenTotals(nll_sum=2.0 * 0.5 + 4.0 * 1.5, weight=2.0, tokens=2, correct=1)
    assert weighted.loss == 3.5
    assert weighted.token_accuracy == 0.5


def test_a_hopeless_loss_still_has_a_finite_perplexity() -> None:
    assert math.isfinite(perplexity(1e9))
    assert math.isnan(perplexity(math.nan))


def test_nothing_supervised_is_refused() -> None:
    with pytest.raises(ValueError, match="no supervised tokens"):
        _ = TokenTotals().loss
    with pytest.raises(ValueError, match="no supervised tokens"):
        _ = TokenTotals().token_accuracy
