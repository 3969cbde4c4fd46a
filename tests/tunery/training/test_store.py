from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tunery.errors import InvalidData
from tunery.training import store as module
from tunery.training.store import TokenStore, build, cache_key

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
