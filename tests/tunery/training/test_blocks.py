"""Texts as examples of one length: by eye, by what must never be lost, and by TRL's packing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.training import blocks
from tunery.training.blocks import fitted, wrapped
from tunery.training.types import Document, Example


def rows(*lengths: int) -> list[Example]:
    """Row r of n tokens is 100 r, 100 r + 1, ..., all of them learnt."""
    made = []
    for row, length in enumerate(lengths):
        ids = np.arange(100 * row, 100 * row + length, dtype=np.int32)
        made.append(Example((Document(ids, ids),), None, row))
    return made


def tokens(example: Example) -> list[list[int]]:
    return [document.input_ids.tolist() for document in example.documents]


def test_a_stream_is_cut_every_so_many_tokens() -> None:
    made = list(wrapped(rows(3, 5, 2), 4))
    assert [tokens(example) for example in made] == [
        [[0, 1, 2, 100]],
        [[101, 102, 103, 104]],
        [[200, 201]],
    ]
    assert [example.index for example in made] == [0, 1, 2]
    assert all((d.labels == d.input_ids).all() for e in made for d in e.documents)


def test_pieces_share_an_example_where_they_fit_best() -> None:
    # 6 is cut into 4 and 2; longest first: 4 | 3 | 2 goes beside nothing of 4, so it opens; 1 fits
    # best beside the 3.
    made = list(fitted(rows(3, 6, 1), 4))
    assert [tokens(example) for example in made] == [
        [[100, 101, 102, 103]],
        [[0, 1, 2], [200]],
        [[104, 105]],
    ]
    assert [example.index for example in made] == [1, 0, 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 16))
def test_no_token_is_lost_or_doubled(lengths: list[int], length: int) -> None:
    every = sorted(t for example in rows(*lengths) for d in tokens(example) for t in d)
    for group in (wrapped, fitted):
        made = list(group(iter(rows(*lengths)), length))
        assert sorted(t for example in made for d in tokens(example) for t in d) == every
        assert all(0 < example.tokens <= length for example in made)
    stream = list(wrapped(rows(*lengths), length))
    assert all(example.tokens == length for example in stream[:-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("group", "strategy"), [(wrapped, "wrapped"), (fitted, "bfd_split")])
def test_examples_are_those_of_trl(group: Any, strategy: str) -> None:
    datasets = pytest.importorskip("datasets")
    from trl import pack_dataset

    draw = np.random.default_rng(0)
    given_rows = rows(*(int(n) for n in draw.integers(1, 60, 40)))
    columns = {"input_ids": [d for example in given_rows for d in tokens(example)]}
    theirs = pack_dataset(datasets.Dataset.from_dict(columns), 32, strategy)
    ours = [[t for d in tokens(example) for t in d] for example in group(given_rows, 32)]
    assert len(ours) == len(theirs)
    if strategy == "wrapped":
        assert ours == theirs["input_ids"]
    else:
        lengths = sorted(length for row in theirs["seq_lengths"] for length in row)
        assert sorted(len(d) for e in group(given_rows, 32) for d in tokens(e)) == lengths


def test_memory_is_bounded_by_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WINDOW", 2)
    taken = []

    def source() -> Any:
        for example in rows(3, 3, 1, 1):
            taken.append(example.index)
            yield example

    first = next(fitted(source(), 4))
    assert tokens(first) == [[0, 1, 2]]
    assert taken == [0, 1]
