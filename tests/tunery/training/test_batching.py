from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.training import batching

if TYPE_CHECKING:
    from tunery.training.types import Layout

lengths = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def arrays(sizes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    longest = np.array(sizes)
    return longest, longest, np.ones_like(longest)


def test_an_epoch_sees_every_example_once() -> None:
    seen = np.concatenate([batching.global_batch(10, 4, 7, step) for step in range(3)])
    assert sorted(seen) == list(range(10))
    assert [len(batching.global_batch(10, 4, 7, step)) for step in range(3)] == [4, 4, 2]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return batching.global_batch(50, 50, seed, number).tolist()

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)


@given(
    sizes=lengths,
    budget=st.integers(1, 200),
    world=st.integers(1, 5),
    layout=st.sampled_from(["rows", "packed"]),
    by_length=st.booleans(),
)
@settings(deadline=None)
def test_every_example_runs_exactly_once_over_all_ranks(
    sizes: list[int], budget: int, world: int, layout: Layout, by_length: bool
) -> None:
    shape = arrays(sizes)
    ran = [
        example
        for rank in range(world)
        for micro in batching.plan(
            np.arange(len(sizes)),
            *shape,
            budget=budget,
            layout=layout,
            by_length=by_length,
            rank=rank,
            world=world,
            even=True,
        )
        if not micro.ghost
        for example in micro.examples
    ]
    assert sorted(ran) == list(range(len(sizes)))


@given(sizes=lengths, budget=st.integers(1, 200), layout=st.sampled_from(["rows", "packed"]))
@settings(deadline=None)
def test_a_micro_batch_keeps_to_its_budget_or_is_one_example(
    sizes: list[int], budget: int, layout: Layout
) -> None:
    shape = arrays(sizes)
    for batch in batching.cut(np.arange(len(sizes)), *shape, budget, layout):
        assert len(batch) == 1 or batching.positions(batch, *shape, layout) <= budget


@given(sizes=lengths, world=st.integers(1, 5), budget=st.integers(1, 200))
@settings(deadline=None)
def test_even_plans_are_equally_long_and_ghosts_come_last(
    sizes: list[int], world: int, budget: int
) -> None:
    plans = [
        batching.plan(
            np.arange(len(sizes)),
            *arrays(sizes),
            budget=budget,
            layout="rows",
            rank=rank,
            world=world,
            even=True,
        )
        for rank in range(world)
    ]
    assert len({len(plan) for plan in plans}) == 1
    for plan in plans:
        ghosts = [micro.ghost for micro in plan]
        assert ghosts == sorted(ghosts)


def test_lengths_are_dealt_alike() -> None:
    longest = np.array([10, 9, 8, 7, 6, 5, 4, 3])
    shares = batching.deal(np.arange(8), longest, 2)
    assert [longest[share].tolist() for share in shares] == [[10, 7, 6, 3], [9, 8, 5, 4]]


def test_rows_of_like_length_share_a_micro_batch() -> None:
    longest = np.array([100, 4, 98, 5, 4])
    batches = batching.cut(np.arange(5), longest, longest, np.ones(5, int), 200, "rows")
    assert batches == [(0, 2), (3, 1, 4)]


def test_unsorted_rows_count_the_widest_of_them() -> None:
    longest = np.array([4, 100, 4])
    shape = (longest, longest, np.ones(3, int))
    batches = batching.cut(np.arange(3), *shape, 200, "rows", False)
    assert batches == [(0, 1), (2,)]


def test_packing_fills_gaps_with_short_examples() -> None:
    tokens = np.array([60, 50, 40, 30])
    batches = batching.cut(np.arange(4), tokens, tokens, np.ones(4, int), 100, "packed")
    assert batches == [(0, 2), (1, 3)]


def test_both_documents_of_a_pair_count_as_rows() -> None:
    longest, two = np.array([10, 10]), np.array([2, 2])
    assert batching.cut(np.arange(2), longest, longest * 2, two, 39, "rows") == [(0,), (1,)]
    assert batching.cut(np.arange(2), longest, longest * 2, two, 40, "rows") == [(0, 1)]


@pytest.mark.parametrize(("examples", "batch", "steps"), [(10, 4, 3), (8, 4, 2), (1, 4, 1)])
def test_a_last_smaller_batch_is_a_step(examples: int, batch: int, steps: int) -> None:
    assert batching.steps_per_epoch(examples, batch) == steps
