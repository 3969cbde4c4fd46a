"""audio_classification: {"audio", "label"}; the audio as bytes or base64, the label a string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, as_it_is, check_label
from tunery.data.formats._media import AUDIO, bytes_of, check_media

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check(row: Row) -> Iterator[Finding]:
    yield from check_media(row["audio"], "audio", AUDIO)
    yield from check_label(row["label"], "label")


def _normal(row: Row) -> Row:
    return {**as_it_is(row), "audio": bytes_of(row["audio"]), "label": str(row["label"])}


FORMAT = Format(
    name="audio_classification",
    task="audio-classification",
    spellings=(frozenset({"audio", "label"}),),
    check=_check,
    normal=_normal,
    content=("audio", "label"),
    labels=lambda row: (row["label"],),
)
