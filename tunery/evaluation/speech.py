"""Error rates of transcriptions: edits over what was said."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def word_error_rate(truths: Sequence[str], predictions: Sequence[str]) -> float:
    """Substituted, dropped and added words over the words said, all texts together; may be above 1.

    Raises:
        ValueError: nothing was said, or the two differ in number.
    """
    return _rate(truths, predictions, str.split)


def character_error_rate(truths: Sequence[str], predictions: Sequence[str]) -> float:
    """As `word_error_rate`, of characters; blanks at the ends do not count.

    Raises:
        ValueError: nothing was said, or the two differ in number.
    """
    return _rate(truths, predictions, lambda text: list(text.strip()))


def plain(text: str) -> str:
    """Lower case, no punctuation, single blanks: what speech does not tell."""
    kept = (" " if unicodedata.category(char)[0] == "P" else char for char in text.casefold())
    return " ".join("".join(kept).split())


def _rate(
    truths: Sequence[str], predictions: Sequence[str], cut: Callable[[str], list[str]]
) -> float:
    from rapidfuzz.distance import Levenshtein

    if len(truths) != len(predictions):
        raise ValueError(f"{len(truths)} truths against {len(predictions)} predictions")
    said = sum(len(cut(truth)) for truth in truths)
    if not said:
        raise ValueError("nothing was said")
    pairs = zip(truths, predictions, strict=True)
    return sum(Levenshtein.distance(cut(a), cut(b)) for a, b in pairs) / said
