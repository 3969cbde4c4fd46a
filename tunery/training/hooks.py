"""What an adapter may do in each optimizer step beside having its parameters updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class StepsRun:
    """What an adapter's `hook` is given.

    Attributes:
        model: as `Adapter.apply` returned it, on its device.
        total_steps: optimizer steps of the whole run.
        seed: draws must depend on it and the step's number alone.
    """

    model: nn.Module
    total_steps: int
    seed: int


class StepHook:
    """Does nothing; an adapter overrides what it needs.

    Every rank makes the same calls with the same numbers, so that the ranks stay alike. Gradients
    are float32 views in the parameters' shapes, by parameter name, and are changed in place.
    """

    calibration_steps: int = 0
    """Optimizer steps whose gradients it wants to see before the first update of a run."""

    def calibrate(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradients of one of these steps, summed over ranks; no update follows."""

    def before_clip(self, gradients: Mapping[str, Tensor]) -> None:
        """The step's gradients, summed over ranks, before their norm is taken."""

    def after_clip(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """The step's gradients as the update will use them; `step` updates were made before."""

    def after_update(self, step: int) -> None:
        """`step` updates were made; the parameters' gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run has to know."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
