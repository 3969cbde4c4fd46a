"""A data file, tokenised once: flat arrays on disk, mapped into memory.

The folder's name is a hash of all that decides the tokens, so that a second run, a resumed run and
every rank of this one map the same pages instead of tokenising again.

    <cache>/<key>/input_ids.npy learnt.npy track-*.npy      one number per token
                  document_ends.npy document_weights.npy
                  example_ends.npy targets.npy indices.npy supervised.npy units.npy
                  array-*.npy shape-*.npy                   examples' further arrays, flat
                  further.json                              names of tracks and arrays
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
    from collections.abc import Callable, Iterable, Mapping

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
_TARGET = "target"
"""Under which an example's target is kept where it is an array."""
_FURTHER = "further.json"
_FLUSH = 1 << 20


class TokenStore:
    """Encoded examples by number. `store[i]` copies no token."""

    def __init__(self, folder: Path) -> None:
        for name in _ARRAYS:
            setattr(self, f"_{name}", _mapped(folder, name))
        further = folder / _FURTHER
        named = json.loads(further.read_text("utf-8")) if further.exists() else {}
        self._tracks = {name: _mapped(folder, f"track-{name}") for name in named.get("tracks", ())}
        self._arrays = {name: _Ragged(folder, name) for name in named.get("arrays", ())}
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
        arrays = {name: array[number] for name, array in self._arrays.items()}
        return Example(
            documents=tuple(
                self._document(d) for d in range(first, int(self._example_ends[number]))
            ),
            target=arrays.pop(_TARGET, None) if target == _NO_TARGET else target,
            index=int(self._indices[number]),
            arrays=arrays,
        )

    def _document(self, number: int) -> Document:
        start = int(self._document_ends[number - 1]) if number else 0
        span = slice(start, int(self._document_ends[number]))
        ids = self._input_ids[span]
        return Document(
            input_ids=ids,
            labels=np.where(self._learnt[span], ids, np.int32(IGNORE)),
            weight=float(self._document_weights[number]),
            tracks={name: track[span] for name, track in self._tracks.items()},
        )

    @property
    def total_tokens(self) -> int:
        return len(self._input_ids)


class _Ragged:
    """Arrays of one type and number of axes, end to end in one file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._data = _mapped(folder, f"array-{name}")
        self._shapes = _mapped(folder, f"shape-{name}")
        self._ends = np.cumsum(self._shapes.prod(axis=1), dtype=np.int64)

    def __getitem__(self, number: int) -> np.ndarray:
        start = int(self._ends[number - 1]) if number else 0
        flat = self._data[start : int(self._ends[number])]
        return flat.reshape(self._shapes[number])


def _mapped(folder: Path, name: str) -> np.ndarray:
    mapped: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r")
    return mapped


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
        further = _Further(lambda name, dtype: _column(files, folder, name, dtype))
        columns = {name: _column(files, folder, name, dtype) for name, dtype in _ARRAYS.items()}
        count = _fill(columns, further, examples, units)
    if not count:
        raise InvalidData("the file has no examples", code="invalid_n_examples")
    for name, dtype in _ARRAYS.items():
        _as_npy(folder / f"{name}.raw", np.dtype(dtype))
    further.finish(folder)


def _column(files: ExitStack, folder: Path, name: str, dtype: Any) -> _Column:
    return files.enter_context(closing(_Column(folder / name, dtype)))


class _Further:
    """Tracks and arrays, whose names and types the examples decide."""

    def __init__(self, column: Callable[[str, Any], _Column]) -> None:
        self._column = column
        self._tracks: dict[str, _Column] = {}
        self._arrays: dict[str, tuple[_Column, _Column, int]] = {}
        self._names: frozenset[str] | None = None
        self._count = 0

    def add_tracks(self, tracks: Mapping[str, np.ndarray], before: int, after: int) -> None:
        """Of the document whose tokens are `before` to `after`; a track it lacks is 0 there."""
        for name, track in tracks.items():
            if name not in self._tracks:
                self._tracks[name] = self._column(f"track-{name}", track.dtype)
                self._tracks[name].extend(np.zeros(before, track.dtype))
            self._tracks[name].extend(track)
        for name in self._tracks.keys() - tracks.keys():
            self._tracks[name].extend(np.zeros(after - before))

    def add_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Of one example.

        Raises:
            ValueError: other names or numbers of axes than the examples before.
        """
        if self._names is None:
            self._names = frozenset(arrays)
            for name, array in arrays.items():
                data = self._column(f"array-{name}", array.dtype)
                shape = self._column(f"shape-{name}", np.int64)
                self._arrays[name] = (data, shape, array.ndim)
        self._count += 1
        if arrays.keys() != self._names:
            raise ValueError(f"an example with arrays {sorted(arrays)}, not {sorted(self._names)}")
        for name, array in arrays.items():
            data, shape, axes = self._arrays[name]
            if array.ndim != axes:
                raise ValueError(f"array {name!r} with {array.ndim} axes, not {axes}")
            data.extend(array.reshape(-1))
            shape.extend(np.array(array.shape, dtype=np.int64))

    def finish(self, folder: Path) -> None:
        """Turn the closed columns into files that can be mapped."""
        for name, track in self._tracks.items():
            _as_npy(folder / f"track-{name}.raw", track.dtype)
        for name, (data, _, axes) in self._arrays.items():
            _as_npy(folder / f"array-{name}.raw", data.dtype)
            _as_npy(folder / f"shape-{name}.raw", np.dtype(np.int64), (self._count, axes))
        named = {"tracks": sorted(self._tracks), "arrays": sorted(self._arrays)}
        (folder / _FURTHER).write_text(json.dumps(named), "utf-8")


def _fill(
    columns: dict[str, _Column],
    further: _Further,
    examples: Iterable[Example],
    units: Callable[[Example], float],
) -> int:
    """Returns the number of examples."""
    tokens = documents = count = 0
    for example in examples:
        count += 1
        for document in example.documents:
            length = len(document.input_ids)
            further.add_tracks(document.tracks, tokens, tokens + length)
            tokens += length
            columns["input_ids"].extend(document.input_ids)
            columns["learnt"].extend(document.labels != IGNORE)
            columns["document_ends"].append(tokens)
            columns["document_weights"].append(document.weight)
        documents += len(example.documents)
        columns["example_ends"].append(documents)
        target = example.target
        columns["targets"].append(target if isinstance(target, int) else _NO_TARGET)
        whole = {_TARGET: target} if isinstance(target, np.ndarray) else {}
        further.add_arrays({**example.arrays, **whole})
        columns["indices"].append(example.index)
        columns["supervised"].append(sum(document.supervised for document in example.documents))
        columns["units"].append(units(example))
    return count


def _as_npy(raw: Path, dtype: np.dtype[Any], shape: tuple[int, ...] = (-1,)) -> None:
    data = np.memmap(raw, dtype, "r") if raw.stat().st_size else np.empty(0, dtype)
    np.save(raw.with_suffix(".npy"), data.reshape(shape))
    raw.unlink()


class _Column:
    """One growing array on disk."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._raw = path.with_suffix(".raw").open("wb")
        self._held: list[np.ndarray] = []
        self._size = 0

    def append(self, value: float) -> None:
        self.extend(np.array([value]))

    def extend(self, values: np.ndarray) -> None:
        self._held.append(values.astype(self.dtype))
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
