"""transcription: {"audio", "text"}: speech, and what is said. The text may be called sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, as_it_is, check_strings
from tunery.data.formats._media import AUDIO, bytes_of, check_media

if TYPE_CHECKING:
    from collections.abc import Iterator


def _column(row: Row) -> str:
    return "text" if row.get("text") is not None else "sentence"


def _check(row: Row) -> Iterator[Finding]:
    yield from check_media(row["audio"], "audio", AUDIO)
    yield from check_strings(_column(row))(row)


def _normal(row: Row) -> Row:
    made = {key: value for key, value in as_it_is(row).items() if key != "sentence"}
    return {**made, "audio": bytes_of(row["audio"]), "text": row[_column(row)]}


FORMAT = Format(
    name="transcription",
    task="speech-to-text",
    spellings=(frozenset({"audio", "text"}), frozenset({"audio", "sentence"})),
    check=_check,
    normal=_normal,
    content=("audio", "text"),
)
