"""Where the examples of a step come from: rows of the file, drawn by seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tunery.training import batching

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tunery.training.store import TokenStore
    from tunery.training.types import Example


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
