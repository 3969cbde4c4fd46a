"""Sounds and pictures in a row: bytes, as Parquet has them, or base64 text, as JSON does."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from tunery.data.formats._base import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

AUDIO = {"WAV": b"RIFF", "FLAC": b"fLaC", "Ogg": b"OggS"}
IMAGE = {"PNG": b"\x89PNG", "JPEG": b"\xff\xd8\xff", "WebP": b"RIFF"}
"""Kinds of file by their first bytes."""


def bytes_of(value: Any) -> bytes | None:
    """The file in a cell: bytes, {"bytes", "path"} as `datasets` has it, or base64; else None."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            return None
    return value if isinstance(value, bytes) else None


def check_media(value: Any, path: str, kinds: dict[str, bytes]) -> Iterator[Finding]:
    """A file of one of the kinds; what is inside is found out when it is decoded."""
    data = bytes_of(value)
    if data is None:
        yield Finding("wrong_type", f"{path} must be a file's bytes, or base64 of them", path)
    elif not data.startswith(tuple(kinds.values())):
        yield Finding("unknown_media", f"{path} is none of {', '.join(kinds)}", path)
