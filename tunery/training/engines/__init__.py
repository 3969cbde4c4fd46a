"""How ranks cooperate: one module per engine, found by the strategies it names.

A module here has `STRATEGIES`, the values of `ext.compute.strategy` that it serves, and
`make(strategy, offload) -> Engine`; `tunery.placement` says what each can offload.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, TypeVar

from tunery.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from tunery.training.optimizer import OptimizerSettings

T = TypeVar("T")


class Engine(Protocol):
    """One rank's view of the training of a model by all ranks.

    Order of calls: `start`, `prepare`, (`restore`), then per step any number of `backward`, the
    last of them marked, and `step` or `discard`; `close` at the end. Every rank makes the same
    calls, except that the number of `backward` may differ unless `even` is True.
    """

    rank: int
    world: int
    even: bool
    """Whether forward and backward passes talk to the other ranks, so that each rank has to run
    equally many."""
    places_model: bool
    """Whether `prepare` wants the model on the host and moves it to the device itself, because one
    device may not hold all of it."""
    model: nn.Module
    """After `prepare`: what objectives call."""

    def start(self, device: torch.device) -> None:
        """Join the other ranks."""
        ...

    def prepare(self, model: nn.Module, settings: OptimizerSettings) -> None:
        """Take charge of a model, its trained parameters marked; on its device, unless this engine
        places it."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient. `loss` is already divided by the step's units, so ranks
        and micro-batches add up."""
        ...

    def step(self) -> Tensor:
        """Sum over ranks, clip, update; returns the gradient norm before clipping (scalar)."""
        ...

    def calibrate(self) -> None:
        """Sum over ranks and show the gradients to the adapter's hook instead of updating."""
        ...

    def discard(self) -> None:
        """Drop the gradients of the step."""
        ...

    def learning_rate_at(self, step: int) -> float:
        """That the optimizer step after `step` steps is made with."""
        ...

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag as True if it is on any rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """All ranks' values, in rank order; plain Python, pickled between the ranks."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters by their names in the prepared model, whole, copied to the CPU.

        All ranks call it; only rank 0's answer need be complete.
        """
        ...

    def snapshot(self) -> Callable[[Path], None]:
        """The resume state as of now, copied; the result writes this rank's files to a folder,
        and may run in another thread while training goes on."""
        ...

    def restore(self, folder: Path, steps: int, earlier: int = 0) -> None:
        """Continue after `steps` steps from a folder that all ranks' snapshots wrote.

        Args:
            earlier: updates before this run's first step, which count for AdamW's bias correction
                and not for the schedule.

        Raises:
            CheckpointCorrupt: the folder is of another run.
        """
        ...

    def close(self) -> None:
        """Leave the other ranks."""
        ...


def engine_for(strategy: str, offload: str = "none") -> Engine:
    """A fresh engine.

    Args:
        offload: what waits in the host's memory: none, optimizer or parameters.

    Raises:
        NotSupported: no module here serves the strategy.
    """
    known: list[str] = []
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if strategy in module.STRATEGIES:
            engine: Engine = module.make(strategy, offload)
            return engine
        known += module.STRATEGIES
    raise NotSupported(
        f"there is no engine for strategy {strategy!r}",
        hint=f"known: {', '.join(sorted(known))}",
        param="ext.compute.strategy",
    )
