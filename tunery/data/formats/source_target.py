"""source_target: {"source", "target"}: a text and what becomes of it, such as its translation."""

from __future__ import annotations

from tunery.data.formats._base import Format, as_it_is, check_strings

FORMAT = Format(
    name="source_target",
    task="sequence-to-sequence",
    spellings=(frozenset({"source", "target"}),),
    check=check_strings("source", "target"),
    normal=as_it_is,
    content=("source", "target"),
)
