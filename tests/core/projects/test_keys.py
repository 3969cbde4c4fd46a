from __future__ import annotations

import re

import pytest

from core.projects.keys import compose, split

SECRET = "s" * 43
KEY = compose("key_" + "A" * 24, SECRET)


def test_a_key_says_whose_it_is_and_comes_apart_again() -> None:
    assert re.fullmatch(r"ft_A{24}_s{43}[0-9A-Za-z]{6}", KEY)
    assert split(KEY) == ("key_" + "A" * 24, SECRET)


@pytest.mark.parametrize("place", range(len(KEY)))
def test_one_wrong_character_anywhere_is_noticed(place: int) -> None:
    for other in "0Zq_":
        if KEY[place] != other:
            assert split(KEY[:place] + other + KEY[place + 1 :]) is None


@pytest.mark.parametrize(
    "text", ["", "ft_", "sk-proj-abc", KEY[:-1], KEY + "0", " " + KEY, KEY + "\n", KEY.upper()]
)
def test_what_is_not_a_key_is_not_looked_up(text: str) -> None:
    assert split(text) is None


def test_swapped_neighbours_are_noticed() -> None:
    key = compose("key_" + "ABCDEFGH" * 3, "0123456789" * 4 + "abc")
    for place in range(3, len(key) - 1):
        if key[place] != key[place + 1]:
            swapped = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
            assert split(swapped) is None, place
