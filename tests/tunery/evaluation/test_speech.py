"""Error rates by hand."""

from __future__ import annotations

import pytest

from tunery.evaluation.speech import character_error_rate, plain, word_error_rate


@pytest.mark.parametrize(
    ("truths", "said", "rate"),
    [
        (["the cat sat"], ["the cat sat"], 0),
        (["the cat sat"], ["the dog sat down"], 2 / 3),
        (["the cat sat"], [""], 1),
        (["a"], ["a b c"], 2),
        (["the cat sat", "yes"], ["the cat", "no"], 2 / 4),  # over all words, not a mean of rates
    ],
)
def test_words_by_hand(truths: list[str], said: list[str], rate: float) -> None:
    assert word_error_rate(truths, said) == pytest.approx(rate)


def test_characters_by_hand() -> None:
    assert character_error_rate(["abcd"], [" abxd "]) == pytest.approx(1 / 4)


def test_plain_keeps_what_is_spoken() -> None:
    assert plain("Hello,  World! It's—fine") == "hello world it s fine"
    assert plain("Добрый день.") == "добрый день"


def test_silence_has_no_rate() -> None:
    with pytest.raises(ValueError, match="nothing was said"):
        word_error_rate([""], ["a"])
    with pytest.raises(ValueError, match="1 truths against 0"):
        word_error_rate(["a"], [])
