"""What rewards have in common: a grade per sample, and what becomes of a sample that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.entries import Grade
from tunery.rewards._template import SampleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tunery.entries import Sample


def each(samples: Sequence[Sample], score: Callable[[Sample], float]) -> list[Grade]:
    """Grade one by one; a completion that cannot be read scores 0, with the reason."""
    return [_one(sample, score) for sample in samples]


def _one(sample: Sample, score: Callable[[Sample], float]) -> Grade:
    try:
        return Grade(score(sample))
    except SampleError as error:
        return Grade(0.0, error=str(error))
