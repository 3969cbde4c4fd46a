"""SQuAD's scores, worked out by hand."""

from __future__ import annotations

import pytest

from tunery.evaluation.answers import exact_match, f1, normal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a man, an ant", "man ant"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("the", ""),
    ],
)
def test_normal_by_hand(text: str, expected: str) -> None:
    assert normal(text) == expected


@pytest.mark.parametrize(
    ("said", "answers", "match", "overlap"),
    [
        ("the cat", ["Cat."], 1, 1),
        ("black cat", ["cat", "dog"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("in the year 1850", ["1850", "year 1850"], 0, 4 / 5),
        ("", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
    ],
)
def test_scores_by_hand(said: str, answers: list[str], match: float, overlap: float) -> None:
    assert exact_match(said, answers) == match
    assert f1(said, answers) == pytest.approx(overlap)
