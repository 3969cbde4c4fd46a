"""Tracks, tags, target arrays and other arrays in a micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tunery.training.collate import collate
from tunery.training.types import IGNORE, Document, Example


def example(ids: list[int], target: Any = None, index: int = 0, **tracks: list[int]) -> Example:
    tokens = np.array(ids, dtype=np.int32)
    ours = {name: np.array(track, dtype=np.int32) for name, track in tracks.items()}
    document = Document(tokens, np.full(len(ids), IGNORE, np.int32), tracks=ours)
    return Example((document,), target, index, {"pixels": np.full((2, 2), ids[0], np.float32)})


ROWS = [
    example([5, 6, 7], tags=[1, IGNORE, 0], token_type_ids=[0, 1, 1]),
    example([8, 9], tags=[2, 2], token_type_ids=[1, 1]),
]


def test_padding_has_no_tag_and_type_zero() -> None:
    batch = collate(ROWS, layout="rows", pad_id=3, mask=True)
    assert batch.tags is not None
    assert batch.tags.tolist() == [[1, IGNORE, 0], [2, 2, IGNORE]]
    assert batch.extras["token_type_ids"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert batch.extras["token_type_ids"].dtype == torch.int64
    assert batch.supervised == 4
    assert batch.inputs().keys() == {"input_ids", "attention_mask", "token_type_ids"}


def test_packed_tracks_stand_end_to_end() -> None:
    batch = collate(ROWS, layout="packed", pad_id=3)
    assert batch.tags is not None
    assert batch.tags.tolist() == [[1, IGNORE, 0, 2, 2]]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ((1, 0), torch.tensor([1, 0])),
        (tuple(np.float32([0.5, 2.0])[:, None][i, 0] for i in (0, 1)), torch.tensor([0.5, 2.0])),
        ((np.float32([0, 1]), np.float32([1, 1])), torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
    ],
)
def test_targets_are_classes_numbers_or_vectors(targets: Any, expected: torch.Tensor) -> None:
    batch = collate([example([1], t) for t in targets], layout="rows", pad_id=0)
    assert batch.targets is not None
    assert batch.targets.dtype == expected.dtype
    assert torch.equal(batch.targets, expected)


def test_arrays_that_the_model_takes_are_stacked() -> None:
    batch = collate(ROWS, layout="rows", pad_id=0, inputs=("pixels",))
    assert batch.extras["pixels"].shape == (2, 2, 2)
    assert batch.extras["pixels"][1, 0, 0] == 8
    batch.feeds_tokens = False
    assert "input_ids" not in batch.inputs()


def test_a_batch_moves_whole() -> None:
    batch = collate(ROWS, layout="rows", pad_id=0, inputs=("pixels",)).to(torch.device("meta"))
    assert batch.tags is not None
    assert batch.tags.is_meta
    assert batch.extras["pixels"].is_meta
