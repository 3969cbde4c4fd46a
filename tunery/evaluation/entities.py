"""Entities in sequences of tags, and how many were found: as seqeval counts them.

Tags are a prefix and a type, such as B-PER: B begins an entity, I goes on, E ends it, S stands
alone, O is none. Reading is lenient, as in the CoNLL-2000 evaluation script: an I that follows
nothing of its type begins an entity. An entity is found when type, first and last word agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OUTSIDE = "O"


class Entity(NamedTuple):
    """Words `first` to `last`, both of them in."""

    type: str
    first: int
    last: int


@dataclass(frozen=True)
class Found:
    """Counts over entities. Shares are 0 where there is nothing to count."""

    correct: int
    predicted: int
    true: int

    @property
    def precision(self) -> float:
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.correct / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        both = self.predicted + self.true
        return 2 * self.correct / both if both else 0.0


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of one sentence, in order."""
    before, kind, first = OUTSIDE, "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        now, now_kind = _parts(tag)
        other = now_kind != kind
        if before != OUTSIDE and (before in "ES" or now in "BSO" or other):
            yield Entity(kind, first, place - 1)
        if now != OUTSIDE and (now in "BS" or before in "ESO" or other):
            first = place
        before, kind = now, now_kind


def _parts(tag: str) -> tuple[str, str]:
    """Prefix and type; a tag without a prefix goes on with what it names."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    if prefix in ("B", "I", "E", "S"):
        return prefix, kind
    return "I", prefix + dash + kind


def found(truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Found:
    """Over all sentences and types.

    Raises:
        ValueError: a sentence has another number of tags in one than in the other.
    """
    correct = predicted = true = 0
    for truth, prediction in zip(truths, predictions, strict=True):
        if len(truth) != len(prediction):
            raise ValueError(f"a sentence of {len(truth)} tags against {len(prediction)}")
        theirs, ours = set(entities(truth)), set(entities(prediction))
        correct += len(theirs & ours)
        predicted += len(ours)
        true += len(theirs)
    return Found(correct, predicted, true)
