from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tunery.errors import InvalidConfig, OutOfMemory
from tunery.training import memory
from tunery.training.features import switches


def test_an_unknown_switch_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="no optimisation is called 'speed'") as caught:
        switches(("speed",))
    assert "label_compaction" in str(caught.value.hint)


def test_prefetched_batches_are_the_planned_ones_in_order(lab: Any) -> None:
    loop, _ = lab.loop(lab.lora(), lab.examples(14), micro_batch_tokens=40)
    planned = loop._plan(loop.train, np.arange(14))
    assert len(planned) > 3
    with ThreadPoolExecutor(1) as pool:
        ahead = [batch.indices for batch in loop._ahead(pool, loop.train, planned)]
    assert ahead == [micro.examples for micro in planned]


def test_prefetching_raises_what_collating_raised(lab: Any) -> None:
    loop, _ = lab.loop(lab.lora(), lab.examples(4))

    class Broken:
        def collate(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyError("no")

    loop.task = Broken()
    planned = loop._plan(loop.train, np.arange(4))
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError):
        list(loop._ahead(pool, loop.train, planned))


def test_memory_errors_are_told_from_others() -> None:
    assert memory.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert memory.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("budget", "positions", "examples", "longest", "smaller"),
    [(4096, 4000, 8, 500, 2000), (4096, 1000, 2, 500, 500), (64, 900, 3, 300, 300)],
)
def test_the_budget_halves_from_what_was_tried(
    budget: int, positions: int, examples: int, longest: int, smaller: int
) -> None:
    assert memory.smaller_budget(budget, positions, examples, longest) == smaller


def test_a_single_example_cannot_be_halved() -> None:
    with pytest.raises(OutOfMemory) as caught:
        memory.smaller_budget(4096, 700, 1, 700)
    assert "700 tokens" in caught.value.message
    assert caught.value.hint


def test_what_failed_is_let_go_before_the_next_try() -> None:
    import weakref

    class Large:
        pass

    held: list[Any] = []
    with memory.attempt() as tried:
        large = Large()
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no")
    del large
    assert tried.failed
    assert held[0]() is None
