"""One rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunery.errors import CheckpointCorrupt
from tunery.training.optimizer import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from tunery.training.optimizer import OptimizerSettings

T = TypeVar("T")
STRATEGIES = frozenset({"single"})
STATE = "optimizer.safetensors"


class SingleEngine:
    """No wrapper, no communication."""

    rank = 0
    world = 1
    even = False
    places_model = False
    model: nn.Module

    def start(self, device: torch.device) -> None:
        """Nobody to join."""

    def prepare(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self.model = model
        self.optimizer = Optimizer(model.named_parameters(), settings)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor:
        return self.optimizer.step()

    def calibrate(self) -> None:
        self.optimizer.calibrate()

    def discard(self) -> None:
        self.optimizer.discard()

    def learning_rate_at(self, step: int) -> float:
        return self.optimizer.learning_rate_at(step)

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def gather(self, value: T) -> list[T]:
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def weights(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def snapshot(self) -> Callable[[Path], None]:
        state = self.optimizer.state()
        return lambda folder: save_file(state, folder / STATE)

    def restore(self, folder: Path, steps: int, earlier: int = 0) -> None:
        try:
            state = load_file(folder / STATE)
        except (OSError, SafetensorError) as error:
            raise CheckpointCorrupt(f"{STATE} cannot be read ({type(error).__name__})") from error
        self.optimizer.load(state, steps, earlier)

    def close(self) -> None:
        """Nobody to leave."""


def make(strategy: str, offload: str) -> SingleEngine:
    return SingleEngine()
