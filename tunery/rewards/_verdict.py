"""The verdict of a completion: what stands before the closing marker.

A model is asked to write its verdict, close it, and may then explain. Without the closing marker
there is no verdict; with two different labels inside there is none either.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def verdict(text: str, open_marker: str | None, close_marker: str | None) -> str | None:
    """The text between the markers; None where one is missing.

    Args:
        open_marker: the verdict begins after its first occurrence; None where the prompt ends with
            it, so that the completion begins with the verdict.
        close_marker: None where the whole rest is the verdict.
    """
    if open_marker is not None:
        _, found, text = text.partition(open_marker)
        if not found:
            return None
    if close_marker is None:
        return text
    before, found, _ = text.partition(close_marker)
    return before if found else None


def labels_in(text: str, labels: Sequence[str]) -> set[str]:
    """The labels that a text names, as whole words and whatever their case.

    Of labels that overlap in the text the longest counts: "not_entailment" does not name
    "entailment", and "very good" not "good".
    """
    by_fold = {label.casefold(): label for label in labels}
    return {by_fold[match.group().casefold()] for match in _words(tuple(labels)).finditer(text)}


@lru_cache(maxsize=16)
def _words(labels: tuple[str, ...]) -> re.Pattern[str]:
    ordered = sorted(labels, key=len, reverse=True)
    either = "|".join(re.escape(label) for label in ordered)
    return re.compile(rf"(?<![\w-])(?:{either})(?![\w-])", re.IGNORECASE)
