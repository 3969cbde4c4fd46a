"""Sums that stay on the device until somebody wants to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from tunery.training.types import LossOutput

LOSS = "loss"


@dataclass
class Reading:
    """Host numbers: per metric, sum and count.

    Attributes:
        sums: metric to [sum, count]; the loss's count is its units.
        bad: (step, micro-batch) of the first loss that was not finite.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)
    bad: tuple[int, int] | None = None

    def add(self, other: Reading) -> None:
        """Make this the reading of both."""
        for name, (total, count) in other.sums.items():
            mine = self.sums.setdefault(name, [0.0, 0.0])
            mine[0] += total
            mine[1] += count
        both = [bad for bad in (self.bad, other.bad) if bad is not None]
        self.bad = min(both, default=None)

    def means(self) -> dict[str, float]:
        """Metric to mean; metrics that counted nothing are left out."""
        return {name: total / count for name, (total, count) in self.sums.items() if count}


class Meter:
    """Collects losses and metrics of micro-batches; `read` is its only device read."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._names: list[tuple[str, int, int]] = []
        """Per loss: its place among the held, and step and micro-batch."""
        self._reading = Reading()

    def add(self, out: LossOutput, units: float, *, step: int = 0, micro: int = 0) -> None:
        """One micro-batch. `units` is its own share of the denominator."""
        self._held.append(out.loss.detach())
        self._names.append((LOSS, step, micro))
        mine = self._reading.sums.setdefault(LOSS, [0.0, 0.0])
        mine[1] += units
        for name, (total, count) in out.sums.items():
            self._held += [total.detach(), count.detach()]
            self._names += [(name, 0, 0), (name, 1, 0)]

    def read(self) -> Reading:
        """Everything so far, and forget it."""
        reading, self._reading = self._reading, Reading()
        if self._held:
            values = torch.stack([value.float() for value in self._held]).tolist()
            for (name, step, micro), value in zip(self._names, values, strict=True):
                _place(reading, name, step, micro, value)
        self._held, self._names = [], []
        return reading

    def merge(self, other: Meter) -> None:
        """Take over what another meter collected, unread."""
        self._held += other._held
        self._names += other._names
        self._reading.add(other._reading)

    def put_back(self, reading: Reading) -> None:
        """Continue from a reading."""
        self._reading.add(reading)


def _place(reading: Reading, name: str, step: int, micro: int, value: float) -> None:
    pair = reading.sums.setdefault(name, [0.0, 0.0])
    if name == LOSS:
        pair[0] += value
        if not math.isfinite(value) and reading.bad is None:
            reading.bad = (step, micro)
    else:
        pair[step] += value
