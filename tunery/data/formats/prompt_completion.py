"""prompt_completion: {"prompt", "completion"}"""

from __future__ import annotations

from tunery.data.formats._base import Format, as_it_is, check_strings

FORMAT = Format(
    name="prompt_completion",
    task="text-generation",
    spellings=(frozenset({"prompt", "completion"}),),
    check=check_strings("prompt", "completion"),
    normal=as_it_is,
    content=("prompt", "completion"),
)
