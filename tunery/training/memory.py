"""Running out of memory, told apart from other failures, and what to try next."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunery.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

_CPU_WORDS = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused. On the CPU torch says so with a bare RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _CPU_WORDS)


@dataclass(slots=True)
class Attempt:
    """Whether the block under `attempt` fitted."""

    failed: bool = False


@contextmanager
def attempt(*, alone: bool = True) -> Iterator[Attempt]:
    """Swallow an allocator's refusal and note it; free what the block held.

    The traceback keeps every tensor of the failed block alive, so it has to be gone before the
    cache is emptied.

    Args:
        alone: whether the block talks to no other rank. If it does, the others now wait for this
            one inside it, where nobody can tell them to start over.

    Raises:
        OutOfMemory: it did not fit, and the block was not alone.
    """
    result = Attempt()
    try:
        yield result
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not alone:
            raise OutOfMemory(
                "a micro-batch does not fit the device's memory",
                hint="lower compute.micro_batch_tokens: this strategy cannot retry a step in "
                "smaller parts",
                param="ext.compute.micro_batch_tokens",
            ) from error
        result.failed = True
    if result.failed:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def smaller_budget(budget: int, positions: int, examples: int, longest: int) -> int:
    """Micro-batch tokens to try after one of `positions` positions did not fit.

    Args:
        examples: in the micro-batch that failed.
        longest: tokens of its longest document.

    Raises:
        OutOfMemory: it was a single example already; there is nothing left to split.
    """
    if examples == 1:
        raise OutOfMemory(
            f"one example of {positions} tokens does not fit the device's memory",
            hint="lower max_length, switch gradient_checkpointing on, or use a device with more "
            "memory",
        )
    return max(min(budget, positions) // 2, min(longest, positions // 2), 1)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory this process held: on the device, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
