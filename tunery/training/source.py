"""Where the examples of a step come from: drawn from the file, or made by the model itself.

A run draws rows by seed and step alone. An objective that learns from the model's own completions
is a `Samples` too: it gives the loop a source that asks the model first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from tunery.training import batching

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

    from tunery.training.engines import Engine
    from tunery.training.store import TokenStore
    from tunery.training.types import Example, Layout, TaskRuntime


class Examples(Protocol):
    """Encoded examples by number, with the numbers that batching needs; see `TokenStore`."""

    documents: np.ndarray
    longest: np.ndarray
    tokens: np.ndarray
    supervised: np.ndarray
    units: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Example: ...


class Held:
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example], units: Callable[[Example], float]) -> None:
        self._examples = tuple(examples)
        self.documents = _numbers(len(example.documents) for example in examples)
        self.longest = _numbers(example.longest for example in examples)
        self.tokens = _numbers(example.tokens for example in examples)
        self.supervised = _numbers(
            sum(document.supervised for document in example.documents) for example in examples
        )
        self.units: np.ndarray = np.array([units(example) for example in examples], np.float64)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number: int) -> Example:
        return self._examples[number]


def _numbers(values: Any) -> np.ndarray:
    return np.fromiter(values, np.int64)


@dataclass(frozen=True, slots=True)
class Draw:
    """What one optimizer step learns from; the same on every rank.

    Attributes:
        chosen: int64 (E,), numbers of `examples`.
        sums: metrics of the drawing itself, as [sum, count].
    """

    examples: Examples
    chosen: np.ndarray
    sums: dict[str, list[float]] = field(default_factory=dict)


class Source(Protocol):
    """Gives each optimizer step its examples."""

    steps_per_epoch: int
    """Optimizer steps of one pass over the file."""

    def draw(self, step: int, budget: int) -> Draw:
        """Of optimizer step `step`, counted from 0. All ranks call it, in order of steps.

        Args:
            budget: tokens that a micro-batch may have.
        """
        ...

    def heaviest(self) -> Draw | None:
        """The step that needs most memory, to be tried out; None where nobody can know."""
        ...

    def row(self, example: Example) -> int:
        """`Example.index` of the row that a drawn example comes from."""
        ...

    def evaluate(self, store: TokenStore, budget: int) -> dict[str, float] | None:
        """Metrics of held-out rows by name; None: the loss on them says it all."""
        ...

    def snapshot(self) -> Callable[[Path], None]:
        """What a resumed run needs beside the step, copied; the result writes it to a folder. Only
        rank 0's is called."""
        ...

    def restore(self, folder: Path, step: int) -> None:
        """Continue before step `step` from what was written then, or from nothing.

        Raises:
            CheckpointCorrupt: unreadable.
        """
        ...


class Drawn:
    """Rows of the file, each once per epoch, in an order that seed and epoch decide."""

    def __init__(self, store: TokenStore, batch_size: int, seed: int) -> None:
        self._store, self._batch_size, self._seed = store, batch_size, seed
        self.steps_per_epoch = batching.steps_per_epoch(len(store), batch_size)

    def draw(self, step: int, budget: int) -> Draw:
        chosen = batching.global_batch(len(self._store), self._batch_size, self._seed, step)
        return Draw(self._store, chosen)

    def heaviest(self) -> Draw | None:
        longest = np.argsort(-self._store.longest, kind="stable")
        return Draw(self._store, longest[: self._batch_size])

    def row(self, example: Example) -> int:
        return example.index

    def evaluate(self, store: TokenStore, budget: int) -> dict[str, float] | None:
        return None

    def snapshot(self) -> Callable[[Path], None]:
        return lambda folder: None

    def restore(self, folder: Path, step: int) -> None:
        """Seed and step say all."""


@dataclass(frozen=True, slots=True)
class SourceRun:
    """What a source is made with.

    Attributes:
        engine: prepared; its model is the one that trains.
        train: encoded prompts of the training file.
        rows, valid_rows: the rows themselves, transforms applied, by `Example.row`.
        batch_size: rows drawn at once.
        stop_ids: tokens that end a reply.
        warn: code, message and numbers, for whoever started the run.
    """

    engine: Engine
    task: TaskRuntime
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    train: TokenStore
    rows: Sequence[Mapping[str, Any]]
    valid_rows: Sequence[Mapping[str, Any]]
    batch_size: int
    seed: int
    layout: Layout
    pad_id: int
    stop_ids: tuple[int, ...]
    warn: Callable[..., None]


@runtime_checkable
class Samples(Protocol):
    """An `Objective` that makes its own examples: the rows of the file are prompts."""

    def source(self, run: SourceRun) -> Source:
        """Called once, after the model is prepared and before anything is restored.

        Raises:
            tunery.errors.InvalidData: a row lacks what the examples are made or judged with.
        """
        ...
