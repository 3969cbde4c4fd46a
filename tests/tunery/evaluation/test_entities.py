"""Entities read off tags, worked out by hand; the counts are those seqeval 1.2.2 gives."""

from __future__ import annotations

import pytest

from tunery.evaluation.entities import Found, entities, found


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("O I-PER I-PER", [("PER", 1, 2)]),  # nothing begins it: read as a beginning
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("I-PER I-LOC I-LOC O", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("B-PER I-PER E-PER S-PER", [("PER", 0, 2), ("PER", 3, 3)]),
        ("E-PER I-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("B-creative-work I-creative-work", [("creative-work", 0, 1)]),
        ("PER PER O LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_by_hand(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert [tuple(entity) for entity in entities(tags.split())] == expected


def test_an_entity_is_found_whole_or_not_at_all() -> None:
    truths = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    counted = found(truths, said)
    assert counted == Found(correct=1, predicted=2, true=2)
    assert (counted.precision, counted.recall, counted.f1) == (0.5, 0.5, 0.5)


def test_types_must_agree_and_nothing_is_zero() -> None:
    counted = found([["B-PER", "O"]], [["B-LOC", "B-LOC"]])
    assert counted == Found(0, 2, 1)
    assert counted.f1 == 0.0
    assert found([["O"]], [["O"]]).f1 == 0.0


def test_sentences_of_unlike_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tags against 1"):
        found([["O", "O"]], [["O"]])
