"""How well scores put the right things first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def ndcg(ranks: Sequence[int], k: int = 10) -> float:
    """Mean normalised discounted gain within the first k, where one thing is right, 0..1.

    Args:
        ranks: of the right thing for each question, from 1.

    Raises:
        ValueError: no ranks.
    """
    return _mean([1 / math.log2(rank + 1) if rank <= k else 0.0 for rank in ranks])


def mrr(ranks: Sequence[int], k: int = 10) -> float:
    """Mean reciprocal rank within the first k, 0..1; see `ndcg`.

    Raises:
        ValueError: no ranks.
    """
    return _mean([1 / rank if rank <= k else 0.0 for rank in ranks])


def recall(ranks: Sequence[int], k: int) -> float:
    """Share of questions whose right thing is within the first k, 0..1; see `ndcg`.

    Raises:
        ValueError: no ranks.
    """
    return _mean([float(rank <= k) for rank in ranks])


@dataclass(frozen=True)
class BestF1:
    """`f1`, 0..1, of calling true what scores `threshold` or more; no threshold gives a higher."""

    f1: float
    threshold: float


def best_f1(truths: Sequence[bool], scores: Sequence[float]) -> BestF1:
    """The threshold that separates best, chosen on these very scores: an upper bound.

    A score that says nothing reaches 2p / (1 + p) where a share p is true, 2/3 for half.

    Raises:
        ValueError: no pairs, or the two differ in length.
    """
    if len(truths) != len(scores):
        raise ValueError(f"{len(truths)} truths against {len(scores)} scores")
    if not truths:
        raise ValueError("nothing to rank")
    true, hits = sum(truths), 0
    best = BestF1(0.0, math.inf)
    ordered = sorted(zip(scores, truths, strict=True), reverse=True)
    for called, (score, truth) in enumerate(ordered, start=1):
        hits += truth
        ends = called == len(ordered) or ordered[called][0] != score  # equal scores go together
        f1 = 2 * hits / (called + true)
        if ends and f1 > best.f1:
            best = BestF1(f1, score)
    return best


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("nothing to rank")
    return sum(values) / len(values)
