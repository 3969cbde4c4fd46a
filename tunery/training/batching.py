"""Which examples make a step, and how a step is cut to fit. Pure functions of numbers.

Mathematics first, memory second: the examples of an optimizer step follow from seed and step alone,
so a resumed run needs no state to find its place; how they are cut into micro-batches, and dealt to
ranks, changes cost and never the gradient, because the loss is normalised over the whole step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunery.training.types import Layout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Example numbers that one rank runs through the model at once.

    Attributes:
        ghost: run for its collectives only; its loss counts 0.
    """

    examples: tuple[int, ...]
    ghost: bool = False


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps of one pass; a last, smaller batch counts."""
    return math.ceil(examples / batch_size)


def global_batch(examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Example numbers of optimizer step `step`, counted from 0 over all epochs: int64 (E,)."""
    epoch, place = divmod(step, steps_per_epoch(examples, batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    return order[place * batch_size : (place + 1) * batch_size]


def deal(chosen: np.ndarray, longest: np.ndarray, world: int) -> list[np.ndarray]:
    """A global batch over ranks: lengths dealt in turns, there and back, so that loads are alike.

    Args:
        longest: tokens of each example's longest document, indexed by example number.
    """
    ordered = chosen[np.argsort(-longest[chosen], kind="stable")]
    turns = np.arange(len(ordered))
    lap, seat = np.divmod(turns, world)
    rank = np.where(lap % 2 == 0, seat, world - 1 - seat)
    return [ordered[rank == r] for r in range(world)]


def cut(
    chosen: np.ndarray,
    longest: np.ndarray,
    tokens: np.ndarray,
    documents: np.ndarray,
    budget: int,
    layout: Layout,
    by_length: bool = True,
) -> list[tuple[int, ...]]:
    """Micro-batches of at most `budget` positions, longest first.

    rows: examples of like length share a micro-batch, whose cost is rows times longest.
    packed: first-fit decreasing over real tokens. An example above the budget stands alone.

    Args:
        longest, tokens, documents: per example number.
        by_length: sort first; without, the examples stay in the order they were drawn in.
    """
    ordered = chosen[np.argsort(-longest[chosen], kind="stable")] if by_length else chosen
    if layout == "packed":
        return _first_fit(ordered, tokens, budget)
    batches: list[list[int]] = []
    rows = width = 0
    for example in ordered.tolist():
        count = int(documents[example])
        wide = max(width, int(longest[example]))
        if not batches or (rows + count) * wide > budget:
            batches.append([])
            rows, wide = 0, int(longest[example])
        width = wide
        batches[-1].append(example)
        rows += count
    return [tuple(batch) for batch in batches]


def _first_fit(ordered: np.ndarray, tokens: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for example in ordered.tolist():
        need = int(tokens[example])
        place = next((i for i, free in enumerate(room) if free >= need), None)
        if place is None:
            batches.append([])
            room.append(budget)
            place = len(room) - 1
        batches[place].append(example)
        room[place] -= need
    return [tuple(batch) for batch in batches]


def plan(
    chosen: np.ndarray,
    longest: np.ndarray,
    tokens: np.ndarray,
    documents: np.ndarray,
    *,
    budget: int,
    layout: Layout,
    by_length: bool = True,
    rank: int = 0,
    world: int = 1,
    even: bool = False,
) -> list[MicroBatch]:
    """One rank's micro-batches of a global batch.

    Args:
        even: give every rank as many micro-batches as the one with most, by ghosts, for engines
            whose forward pass talks to the other ranks.
    """
    shares = [
        cut(share, longest, tokens, documents, budget, layout, by_length)
        for share in deal(chosen, longest, world)
    ]
    mine = [MicroBatch(examples) for examples in shares[rank]]
    if even:
        shortest = int(chosen[np.argmin(longest[chosen])])
        missing = max(map(len, shares)) - len(mine)
        mine += [MicroBatch((shortest,), ghost=True)] * missing
    return mine


def positions(
    batch: Sequence[int],
    longest: np.ndarray,
    tokens: np.ndarray,
    documents: np.ndarray,
    layout: Layout,
) -> int:
    """Positions that a micro-batch occupies, padding included."""
    members = list(batch)
    if layout == "packed":
        return int(tokens[members].sum())
    return int(longest[members].max()) * int(documents[members].sum())
