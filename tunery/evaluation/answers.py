"""Exact match and F1 of answers, as SQuAD defines them.

Rajpurkar et al.: SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016, arXiv
1606.05250; answers that are not there as in Rajpurkar et al.: Know What You Don't Know, 2018, arXiv
1806.03822.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normal(text: str) -> str:
    """Lower case, without punctuation and English articles, single blanks."""
    kept = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if it is one of the answers after `normal`, else 0; no answers ask for the empty text."""
    return max(float(normal(prediction) == normal(answer)) for answer in answers or ("",))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Overlap in words with the best of the answers, 0..1."""
    return max(_overlap(normal(prediction), normal(answer)) for answer in answers or ("",))


def _overlap(prediction: str, answer: str) -> float:
    said, true = prediction.split(), answer.split()
    if not said or not true:
        return float(said == true)
    return 2 * (Counter(said) & Counter(true)).total() / (len(said) + len(true))
