"""Regular expressions that users write."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator

MAX_CHARS = 1000


@lru_cache(maxsize=64)
def compiled(source: str) -> re.Pattern[str]:
    """The expression, `.` matching line breaks too."""
    return re.compile(source, re.DOTALL)


def check_pattern(source: str) -> str:
    """Return `source` if it is a regular expression.

    Raises:
        ValueError: too long, or none; says where.
    """
    if len(source) > MAX_CHARS:
        raise ValueError(f"the expression has {len(source)} characters, at most {MAX_CHARS}")
    try:
        compiled(source)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return source


Pattern = Annotated[str, AfterValidator(check_pattern)]
