from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tunery.errors import InvalidData
from tunery.training import store as module
from tunery.training.store import TokenStore, build, cache_key
from tunery.training.types import Document, Example

if TYPE_CHECKING:
    from pathlib import Path


def units(example: Any) -> float:
    return float(example.documents[0].supervised)


@pytest.mark.parametrize("flush", [1, 7, 1 << 20])
def test_what_comes_out_is_what_went_in(
    lab: Any, tmp_path: Path, flush: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLUSH", flush)
    examples = lab.examples(7, documents=2, weight=0.5)
    store = build(iter(examples), units, tmp_path / "s")
    assert len(store) == 7
    for number, example in enumerate(examples):
        again = store[number]
        assert (again.target, again.index) == (example.target, example.index)
        for mine, theirs in zip(again.documents, example.documents, strict=True):
            assert mine.input_ids.tolist() == theirs.input_ids.tolist()
            assert mine.labels.tolist() == theirs.labels.tolist()
            assert mine.weight == theirs.weight
    assert store.longest.tolist() == [e.longest for e in examples]
    assert store.tokens.tolist() == [e.tokens for e in examples]
    assert store.documents.tolist() == [2] * 7
    assert store.units.tolist() == [units(e) for e in examples]
    assert store.supervised.tolist() == [sum(d.supervised for d in e.documents) for e in examples]
    assert store.total_tokens == sum(e.tokens for e in examples)


def example(index: int, length: int, target: Any = None, **more: Any) -> Example:
    ids = np.arange(length, dtype=np.int32)
    tracks = more.pop("tracks", {})
    return Example((Document(ids, ids, tracks=tracks),), target, index, more)


@pytest.mark.parametrize("flush", [1, 1 << 20])
def test_tracks_arrays_and_array_targets_come_back(
    tmp_path: Path, flush: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLUSH", flush)
    draw = np.random.default_rng(0)
    made = [
        example(
            number,
            number + 1,
            draw.random(3).astype(np.float32),
            pixels=draw.random((2, number)).astype(np.float32),
            places=np.array([number, -number]),
            score=np.float64(number),
            tracks={"tags": np.arange(number + 1, dtype=np.int32)},
        )
        for number in range(4)
    ]
    store = build(iter(made), units, tmp_path / "s")
    for number, before in enumerate(made):
        after = store[number]
        assert isinstance(after.target, np.ndarray)
        assert after.target.dtype == np.float32
        np.testing.assert_array_equal(after.target, before.target)
        assert after.arrays.keys() == before.arrays.keys()
        for name, array in before.arrays.items():
            np.testing.assert_array_equal(after.arrays[name], array)
            assert after.arrays[name].shape == array.shape
        tags = after.documents[0].tags
        assert tags is not None
        assert tags.tolist() == list(range(number + 1))
    assert store.supervised.tolist() == [1, 2, 3, 4]


def test_a_track_that_a_document_lacks_is_zero_there(tmp_path: Path) -> None:
    types = np.ones(2, dtype=np.int32)
    made = [example(0, 3), example(1, 2, tracks={"token_type_ids": types}), example(2, 1)]
    store = build(made, units, tmp_path / "s")
    read = [store[number].documents[0].tracks["token_type_ids"].tolist() for number in range(3)]
    assert read == [[0, 0, 0], [1, 1], [0]]


def test_examples_with_other_arrays_than_the_first_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arrays \[\], not \['pixels'\]"):
        build([example(0, 1, pixels=np.zeros(3)), example(1, 1)], units, tmp_path / "s")
    pixels = (np.zeros((1, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="1 axes, not 2"):
        build([example(i, 1, pixels=p) for i, p in enumerate(pixels)], units, tmp_path / "s")


def test_a_store_that_is_there_is_not_built_again(lab: Any, tmp_path: Path) -> None:
    build(lab.examples(3), units, tmp_path / "s")

    def unread() -> Any:
        raise AssertionError("the rows were read again")
        yield

    assert len(build(unread(), units, tmp_path / "s")) == 3


def test_a_failure_on_the_way_leaves_nothing(lab: Any, tmp_path: Path) -> None:
    def broken() -> Any:
        yield from lab.examples(2)
        raise InvalidData("row 2: no")

    with pytest.raises(InvalidData):
        build(broken(), units, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_no_examples_is_an_error_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidData) as caught:
        build([], units, tmp_path / "s")
    assert caught.value.code == "invalid_n_examples"


def test_tokens_are_mapped_not_loaded(lab: Any, tmp_path: Path) -> None:
    store: TokenStore = build(lab.examples(3), units, tmp_path / "s")
    base = store[1].documents[0].input_ids
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_keys_differ_with_what_decides_the_tokens() -> None:
    assert cache_key({"a": 1, "b": [2]}) == cache_key({"b": [2], "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})
