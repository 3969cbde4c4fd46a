"""Accuracy and F1 from label pairs. Plain Python: no torch, no scikit-learn.

Labels may be of any hashable type, names and ids alike. As in scikit-learn's defaults, classes are
those that occur among the truths or the predictions, and a class never predicted has F1 0.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence, Set


@dataclass(frozen=True)
class ClassScore:
    """One class: `f1` in 0..1 and `support`, the number of true examples."""

    f1: float
    support: int


def accuracy(truths: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Share of equal pairs, 0..1.

    Raises:
        ValueError: no pairs, or the two differ in length.
    """
    _check(truths, predictions)
    return sum(a == b for a, b in zip(truths, predictions, strict=True)) / len(truths)


def class_scores(
    truths: Sequence[Hashable], predictions: Sequence[Hashable]
) -> dict[Any, ClassScore]:
    """F1 and support of every class that occurs.

    Raises:
        ValueError: no pairs, or the two differ in length.
    """
    _check(truths, predictions)
    support = Counter(truths)
    predicted = Counter(predictions)
    hits = Counter(a for a, b in zip(truths, predictions, strict=True) if a == b)
    # F1 = 2 TP / (2 TP + FP + FN), and support + predicted = 2 TP + FP + FN.
    return {
        label: ClassScore(2 * hits[label] / (support[label] + predicted[label]), support[label])
        for label in support | predicted
    }


def macro_f1(truths: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Unweighted mean of the classes' F1: rare classes count as much as common ones.

    Raises:
        ValueError: no pairs, or the two differ in length.
    """
    scores = class_scores(truths, predictions).values()
    return sum(score.f1 for score in scores) / len(scores)


def weighted_f1(truths: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Mean of the classes' F1, each weighted by its number of true examples.

    Raises:
        ValueError: no pairs, or the two differ in length.
    """
    scores = class_scores(truths, predictions).values()
    return sum(score.f1 * score.support for score in scores) / len(truths)


@dataclass(frozen=True)
class SetScores:
    """Scores of label sets, 0..1, as in scikit-learn with zero_division=0."""

    micro_f1: float
    macro_f1: float
    subset_accuracy: float


def label_sets(
    truths: Sequence[Set[int]], predictions: Sequence[Set[int]], classes: int
) -> SetScores:
    """F1 over all decisions, mean of the classes' F1, and share of sets that are wholly right.

    Raises:
        ValueError: no examples, or the two differ in length.
    """
    _check(truths, predictions)
    support = Counter(label for labels in truths for label in labels)
    predicted = Counter(label for labels in predictions for label in labels)
    hits = Counter(label for a, b in zip(truths, predictions, strict=True) for label in a & b)
    every = support.total() + predicted.total()
    each = (
        2 * hits[label] / both if (both := support[label] + predicted[label]) else 0.0
        for label in range(classes)
    )
    return SetScores(
        micro_f1=2 * hits.total() / every if every else 0.0,
        macro_f1=sum(each) / classes,
        subset_accuracy=sum(a == b for a, b in zip(truths, predictions, strict=True)) / len(truths),
    )


def _check(truths: Sequence[object], predictions: Sequence[object]) -> None:
    if len(truths) != len(predictions):
        raise ValueError(f"{len(truths)} truths against {len(predictions)} predictions")
    if not truths:
        raise ValueError("no examples to score")
