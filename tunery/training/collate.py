"""Examples as tensors: padded rows or one packed row, and where in them something is learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tunery.training.types import DISCOUNTS, IGNORE, TAGS, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunery.training.types import Document, Example, Layout


def collate(
    examples: Sequence[Example],
    *,
    layout: Layout,
    pad_id: int,
    mask: bool = False,
    inputs: Sequence[str] = (),
) -> Batch:
    """A micro-batch on the CPU.

    Args:
        mask: give padded rows their attention mask. A causal model needs none: padding stands on
            the right, where no real token can look.
        inputs: which of the examples' arrays the model takes, stacked, by its argument's name.
    """
    documents = [document for example in examples for document in example.documents]
    lengths = np.array([len(document.input_ids) for document in documents], dtype=np.int64)
    width = int(lengths.max())
    starts = np.cumsum(lengths) - lengths if layout == "packed" else np.arange(len(lengths)) * width
    where, ids, owners, weights = _targets(documents, starts)
    padded = layout == "rows" and bool((lengths != width).any())
    tracks = _tracks(documents, layout, width)
    tags = tracks.pop(TAGS, None)
    return Batch(
        input_ids=_input_ids(documents, layout, width, pad_id),
        attention_mask=_mask(lengths, width) if mask and padded else None,
        position_ids=_restarting(lengths) if layout == "packed" else None,
        cu_seqlens=_boundaries(lengths) if layout == "packed" else None,
        max_seqlen=width,
        target_positions=torch.from_numpy(where),
        target_ids=torch.from_numpy(ids),
        target_weights=None if (weights == 1).all() else torch.from_numpy(weights),
        target_documents=torch.from_numpy(owners),
        targets=_of_examples(examples),
        indices=tuple(example.index for example in examples),
        documents=len(documents),
        tokens=int(lengths.sum()),
        supervised=len(ids) if tags is None else int((tags != IGNORE).sum()),
        extras={**tracks, **{name: stacked(examples, name) for name in inputs}},
        tags=tags,
        lengths=torch.from_numpy(lengths),
    )


def stacked(examples: Sequence[Example], name: str) -> torch.Tensor:
    """The array of that name of all examples, which have one shape: (E, ...)."""
    return torch.from_numpy(np.stack([example.arrays[name] for example in examples]))


def _tracks(documents: Sequence[Document], layout: Layout, width: int) -> dict[str, torch.Tensor]:
    """The tracks of all documents, (B, T); padding is 0, of tags `IGNORE`."""
    names = {name for document in documents for name in document.tracks} - {DISCOUNTS}
    return {name: _track(documents, name, layout, width) for name in sorted(names)}


def _track(documents: Sequence[Document], name: str, layout: Layout, width: int) -> torch.Tensor:
    parts = [document.tracks.get(name, np.zeros_like(document.labels)) for document in documents]
    dtype = np.int64 if np.issubdtype(parts[0].dtype, np.integer) else parts[0].dtype
    if layout == "packed":
        return torch.from_numpy(np.concatenate(parts).astype(dtype))[None]
    rows = np.full((len(parts), width), IGNORE if name == TAGS else 0, dtype=dtype)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return torch.from_numpy(rows)


def _targets(
    documents: Sequence[Document], starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flat positions, next tokens, documents and weights of what is learnt; each (S,)."""
    where, ids, owners, weights = [], [], [], []
    for number, document in enumerate(documents):
        learnt = np.flatnonzero(document.labels[1:] != IGNORE)
        where.append(learnt + starts[number])
        ids.append(document.labels[1:][learnt].astype(np.int64))
        owners.append(np.full(len(learnt), number, dtype=np.int64))
        weights.append(_weights(document, learnt))
    owner, weight = np.concatenate(owners), np.concatenate(weights)
    return np.concatenate(where).astype(np.int64), np.concatenate(ids), owner, weight


def _weights(document: Document, learnt: np.ndarray) -> np.ndarray:
    """Of the tokens after the positions `learnt`: float32."""
    weights = np.full(len(learnt), document.weight, dtype=np.float32)
    if DISCOUNTS in document.tracks:
        weights *= 1 - document.tracks[DISCOUNTS][1:][learnt]
    return weights


def _input_ids(
    documents: Sequence[Document], layout: Layout, width: int, pad_id: int
) -> torch.Tensor:
    if layout == "packed":
        joined = np.concatenate([document.input_ids for document in documents])
        return torch.from_numpy(joined.astype(np.int64))[None]
    rows = np.full((len(documents), width), pad_id, dtype=np.int64)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document.input_ids)] = document.input_ids
    return torch.from_numpy(rows)


def _mask(lengths: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy((np.arange(width)[None] < lengths[:, None]).astype(np.int64))


def _restarting(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]


def _boundaries(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _of_examples(examples: Sequence[Example]) -> torch.Tensor | None:
    """Class ids, int64 (E,), or target arrays, (E, ...)."""
    targets = [example.target for example in examples]
    if any(target is None for target in targets):
        return None
    return torch.from_numpy(np.stack([np.asarray(target) for target in targets]))
