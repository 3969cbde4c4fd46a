"""Data parallelism: every rank holds the model, gradients are summed once per optimizer step.

Not `DistributedDataParallel`: adapters are a few megabytes, so one all-reduce of the optimizer's
flat buffer after the last micro-batch costs less than hooks on every tensor in every one. It also
leaves ranks free to run different numbers of micro-batches, none included, and to find out together
that one of them ran out of memory before anybody waits for its gradients.
"""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from tunery.training.engines.single import SingleEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from tunery.training.optimizer import OptimizerSettings

T = TypeVar("T")
STRATEGIES = frozenset({"ddp"})
_PATIENCE = datetime.timedelta(minutes=30)


class DdpEngine(SingleEngine):
    """Sums over ranks by NCCL or gloo; host-side agreement always by gloo."""

    def start(self, device: torch.device) -> None:
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
        self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def prepare(self, model: nn.Module, settings: OptimizerSettings) -> None:
        super().prepare(model, settings)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)

    def step(self) -> Tensor:
        self._sum()
        return super().step()

    def calibrate(self) -> None:
        self._sum()
        super().calibrate()

    def _sum(self) -> None:
        for gradient in self.optimizer.gradients():
            dist.all_reduce(gradient)

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        together = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self._host)
        return tuple(bool(flag) for flag in together.tolist())

    def gather(self, value: T) -> list[T]:
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value, group=self._host)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self._host)

    def snapshot(self) -> Callable[[Path], None]:
        if self.rank == 0:
            return super().snapshot()
        return lambda folder: None

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def make(strategy: str, offload: str) -> DdpEngine:
    return DdpEngine()
