"""Documents of any length as examples of one length, for training on plain text.

Wrapped: one document after another, as one stream that is cut every `length` tokens. Every example
but the last is full, and a token sees all that stands before it in its example, other documents
too. Fitted: documents longer than `length` are cut into pieces, and pieces are put together while
they fit, best fit first (Ding et al. 2024, arXiv 2404.10830). Each piece attends to itself alone.
Neither drops a token.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from tunery.training.types import Document, Example

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WINDOW = 4096
"""Pieces that are fitted together; memory, and how full the examples become."""

Piece = tuple[Document, int]
"""With the number of its row."""


def wrapped(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Examples of one document of `length` tokens each; the last one may be shorter.

    An example's index is the row in which it begins.
    """
    held: list[Piece] = []
    room = length
    for document, row in _documents(examples):
        start = 0
        while len(document.input_ids) - start >= room:
            held.append((_part(document, start, start + room), row))
            yield Example((_joined([part for part, _ in held]),), None, held[0][1])
            start, room, held = start + room, length, []
        if start < len(document.input_ids):
            rest = _part(document, start, len(document.input_ids))
            held.append((rest, row))
            room -= len(rest.input_ids)
    if held:
        yield Example((_joined([part for part, _ in held]),), None, held[0][1])


def fitted(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Examples of several documents with at most `length` tokens together.

    An example's index is the row of its longest document.
    """
    pieces = _pieces(examples, length)
    while window := list(islice(pieces, WINDOW)):
        for block in _best_fit(window, length):
            yield Example(tuple(document for document, _ in block), None, block[0][1])


def _documents(examples: Iterable[Example]) -> Iterator[Piece]:
    for example in examples:
        for document in example.documents:
            yield document, example.index


def _pieces(examples: Iterable[Example], length: int) -> Iterator[Piece]:
    for document, row in _documents(examples):
        for start in range(0, len(document.input_ids), length):
            yield _part(document, start, start + length), row


def _best_fit(pieces: Sequence[Piece], length: int) -> list[list[Piece]]:
    """The longest first, each where it leaves least room."""
    blocks: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # room and number of each block, ascending
    for piece in sorted(pieces, key=lambda piece: -len(piece[0].input_ids)):
        need = len(piece[0].input_ids)
        place = bisect_left(rooms, (need, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = length, len(blocks)
            blocks.append([])
        blocks[number].append(piece)
        insort(rooms, (room - need, number))
    return blocks


def _part(document: Document, start: int, end: int) -> Document:
    return Document(document.input_ids[start:end], document.labels[start:end], document.weight)


def _joined(parts: Sequence[Document]) -> Document:
    return Document(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
