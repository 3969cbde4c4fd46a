"""A data file, tokenised once: flat arrays on disk, mapped into memory.

The folder's name is a hash of all that decides the tokens, so that a second run, a resumed run and
every rank of this one map the same pages instead of tokenising again.

    <cache>/<key>/input_ids.npy learnt.npy      one number per token
                  document_ends.npy document_weights.npy
                  example_ends.npy targets.npy indices.npy supervised.npy units.npy
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunery.errors import InvalidData
from tunery.training.types import IGNORE, Document, Example

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ARRAYS = {
    "input_ids": np.int32,
    "learnt": np.bool_,
    "document_ends": np.int64,
    "document_weights": np.float32,
    "example_ends": np.int64,
    "targets": np.int64,
    "indices": np.int64,
    "supervised": np.int64,
    "units": np.float64,
}
_NO_TARGET = -1
_FLUSH = 1 << 20


class TokenStore:
    """Encoded examples by number. `store[i]` copies no token."""

    def __init__(self, folder: Path) -> None:
        for name in _ARRAYS:
            setattr(self, f"_{name}", np.load(folder / f"{name}.npy", mmap_mode="r"))
        self._input_ids: np.ndarray
        self._learnt: np.ndarray
        self._document_ends: np.ndarray
        self._document_weights: np.ndarray
        self._example_ends: np.ndarray
        self._targets: np.ndarray
        self._indices: np.ndarray
        self._units: np.ndarray
        self._supervised: np.ndarray
        lengths = np.diff(self._document_ends, prepend=0)
        starts = np.concatenate([[0], self._example_ends[:-1]]).astype(np.int64)
        empty = len(self) == 0
        self.documents: np.ndarray = np.diff(self._example_ends, prepend=0)
        """Documents per example: int64 (N,)."""
        self.longest: np.ndarray = lengths if empty else np.maximum.reduceat(lengths, starts)
        """Tokens of each example's longest document: int64 (N,)."""
        self.tokens: np.ndarray = lengths if empty else np.add.reduceat(lengths, starts)
        """Tokens of each example: int64 (N,)."""
        self.supervised: np.ndarray = np.asarray(self._supervised)
        """Tokens of each example that are predicted and scored: int64 (N,)."""
        self.units: np.ndarray = np.asarray(self._units)
        """Share of each example in the loss's denominator: float64 (N,)."""

    def __len__(self) -> int:
        return len(self._example_ends)

    def __getitem__(self, number: int) -> Example:
        first = int(self._example_ends[number - 1]) if number else 0
        target = int(self._targets[number])
        return Example(
            documents=tuple(
                self._document(d) for d in range(first, int(self._example_ends[number]))
            ),
            target=None if target == _NO_TARGET else target,
            index=int(self._indices[number]),
        )

    def _document(self, number: int) -> Document:
        start = int(self._document_ends[number - 1]) if number else 0
        span = slice(start, int(self._document_ends[number]))
        ids = self._input_ids[span]
        return Document(
            input_ids=ids,
            labels=np.where(self._learnt[span], ids, np.int32(IGNORE)),
            weight=float(self._document_weights[number]),
        )

    @property
    def total_tokens(self) -> int:
        return len(self._input_ids)


def cache_key(parts: Any) -> str:
    """Hash of plain JSON that decides the tokens."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def build(
    examples: Iterable[Example], units: Callable[[Example], float], folder: Path
) -> TokenStore:
    """Write `examples` to `folder` (all of it or nothing) and open it; keep one that is there.

    Memory is bounded: arrays go to disk as they fill.

    Raises:
        InvalidData: there is no example.
    """
    if not (folder / "indices.npy").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(examples, units, temporary)
            try:
                temporary.rename(folder)
            except OSError:
                if not (folder / "indices.npy").exists():  # else another run was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    os.utime(folder)
    return TokenStore(folder)


def _write(examples: Iterable[Example], units: Callable[[Example], float], folder: Path) -> None:
    with ExitStack() as files:
        columns = {
            name: files.enter_context(closing(_Column(folder / name, dtype)))
            for name, dtype in _ARRAYS.items()
        }
        count = _fill(columns, examples, units)
    if not count:
        raise InvalidData("the file has no examples", code="invalid_n_examples")
    for name, dtype in _ARRAYS.items():
        _as_npy(folder / f"{name}.raw", np.dtype(dtype))


def _fill(
    columns: dict[str, _Column], examples: Iterable[Example], units: Callable[[Example], float]
) -> int:
    """Returns the number of examples."""
    tokens = documents = count = 0
    for example in examples:
        count += 1
        for document in example.documents:
            tokens += len(document.input_ids)
            columns["input_ids"].extend(document.input_ids)
            columns["learnt"].extend(document.labels != IGNORE)
            columns["document_ends"].append(tokens)
            columns["document_weights"].append(document.weight)
        documents += len(example.documents)
        columns["example_ends"].append(documents)
        columns["targets"].append(_NO_TARGET if example.target is None else example.target)
        columns["indices"].append(example.index)
        columns["supervised"].append(sum(document.supervised for document in example.documents))
        columns["units"].append(units(example))
    return count


def _as_npy(raw: Path, dtype: np.dtype[Any]) -> None:
    data = np.memmap(raw, dtype, "r") if raw.stat().st_size else np.empty(0, dtype)
    np.save(raw.with_suffix(".npy"), data)
    raw.unlink()


class _Column:
    """One growing array on disk."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._raw = path.with_suffix(".raw").open("wb")
        self._held: list[np.ndarray] = []
        self._size = 0

    def append(self, value: float) -> None:
        self.extend(np.array([value]))

    def extend(self, values: np.ndarray) -> None:
        self._held.append(values.astype(self._dtype))
        self._size += len(values)
        if self._size >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._raw.write(np.concatenate(self._held).tobytes())
        self._held, self._size = [], 0

    def close(self) -> None:
        self._flush()
        self._raw.close()
