"""image_classification: {"image", "label"}; the image as bytes or base64, the label a string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.data.formats._base import Finding, Format, Row, as_it_is, check_label
from tunery.data.formats._media import IMAGE, bytes_of, check_media

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check(row: Row) -> Iterator[Finding]:
    yield from check_media(row["image"], "image", IMAGE)
    yield from check_label(row["label"], "label")


def _normal(row: Row) -> Row:
    return {**as_it_is(row), "image": bytes_of(row["image"]), "label": str(row["label"])}


FORMAT = Format(
    name="image_classification",
    task="image-classification",
    spellings=(frozenset({"image", "label"}),),
    check=_check,
    normal=_normal,
    content=("image", "label"),
    labels=lambda row: (row["label"],),
)
