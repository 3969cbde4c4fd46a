"""text: {"text"}"""

from __future__ import annotations

from tunery.data.formats._base import Format, as_it_is, check_strings

FORMAT = Format(
    name="text",
    task="text-generation",
    spellings=(frozenset({"text"}),),
    check=check_strings("text"),
    normal=as_it_is,
    content=("text",),
)
