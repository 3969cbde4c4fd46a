"""How well numbers agree: errors and correlations. Plain Python: no scipy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def mean_squared_error(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Raises: ValueError: no pairs, or the two differ in length."""
    _check(truths, predictions)
    return _mean([(a - b) ** 2 for a, b in zip(truths, predictions, strict=True)])


def mean_absolute_error(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Raises: ValueError: no pairs, or the two differ in length."""
    _check(truths, predictions)
    return _mean([abs(a - b) for a, b in zip(truths, predictions, strict=True)])


def pearson(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Linear correlation, -1..1; 0 where either side is constant and nothing correlates.

    Raises:
        ValueError: no pairs, or the two differ in length.
    """
    _check(truths, predictions)
    left, right = _centred(truths), _centred(predictions)
    size = math.sqrt(math.fsum(a * a for a in left) * math.fsum(b * b for b in right))
    if not size:
        return 0.0
    return math.fsum(a * b for a, b in zip(left, right, strict=True)) / size


def spearman(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Correlation of ranks, -1..1; equal values share the mean of their ranks.

    Raises:
        ValueError: no pairs, or the two differ in length.
    """
    return pearson(_ranks(truths), _ranks(predictions))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end - 1) / 2
        start = end
    return ranks


def _centred(values: Sequence[float]) -> list[float]:
    mean = _mean(values)
    return [value - mean for value in values]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _check(truths: Sequence[float], predictions: Sequence[float]) -> None:
    if len(truths) != len(predictions):
        raise ValueError(f"{len(truths)} truths against {len(predictions)} predictions")
    if not truths:
        raise ValueError("no examples to score")
