"""Child-Tuning: full fine-tuning in which each step, or the whole run, updates a part only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters.full import Full, FullConfig
from tunery.training.hooks import StepHook

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from tunery.entries import Adapter, EntryConfig
    from tunery.training.hooks import StepsRun


class ChildTuningConfig(FullConfig):
    mode: Literal["free", "fisher"] = Field(
        "free",
        description="free (Child-Tuning-F): another random part in each step. fisher "
        "(Child-Tuning-D): the part whose gradients on the training file are largest, chosen once.",
    )
    share: float = Field(
        0.3, gt=0, lt=1, description="Share of the parameters in that part; 0.2 to 0.4 are usual."
    )
    fisher_steps: int = Field(
        64,
        ge=1,
        le=100_000,
        description="Batches whose gradients are looked at before the first step, with fisher.",
    )


class ChildTuning(Full):
    name: ClassVar[str] = "child_tuning"
    title: ClassVar[str] = "Child-Tuning"
    summary: ClassVar[str] = (
        "Full fine-tuning that updates a random or a chosen part of the parameters, against "
        "overfitting on small data."
    )
    paper: ClassVar[str | None] = (
        "Xu et al.: Raise a Child in Large Language Model: Towards Effective and Generalizable "
        "Fine-tuning, 2021, arXiv 2109.05687"
    )
    Config: ClassVar[type[EntryConfig]] = ChildTuningConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "child_tuning", "mode": "free", "share": 0.3}
    strategies: ClassVar[frozenset[str] | None] = frozenset({"single", "ddp"})

    def hook(self, config: ChildTuningConfig, run: StepsRun) -> StepHook:
        """Masks the clipped gradients, as the authors' optimizer does."""
        heads = _fresh(run.model)
        if config.mode == "free":
            return _Free(config.share, run.seed)
        return _Fisher(config.share, config.fisher_steps, heads)


def _fresh(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of a classification head, which has nothing pretrained to keep."""
    from tunery.adapters._peft import heads_of

    heads = heads_of(model)
    return frozenset(
        name for name, _ in model.named_parameters() if name.partition(".")[0] in heads
    )


class _Free(StepHook):
    """Gradients times Bernoulli(share) / share, drawn anew in each step."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._seed = share, seed

    def after_clip(self, gradients: Mapping[str, Tensor], step: int) -> None:
        import torch

        generators: dict[Any, torch.Generator] = {}
        for gradient in gradients.values():
            device = gradient.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(
                    self._seed * 1_000_003 + step
                )
            kept = torch.empty_like(gradient).bernoulli_(self._share, generator=generators[device])
            gradient.mul_(kept).div_(self._share)


class _Fisher(StepHook):
    """Gradients times a mask of the parameters with the largest mean squared gradient.

    The head, which is drawn anew, trains whole.
    """

    def __init__(self, share: float, steps: int, heads: frozenset[str]) -> None:
        self._share, self.calibration_steps, self._heads = share, steps, heads
        self._squares: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._seen = 0

    def calibrate(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if name in self._heads:
                continue
            square = gradient.square()
            if name in self._squares:
                self._squares[name].add_(square)
            else:
                self._squares[name] = square
        self._seen += 1
        if self._seen == self.calibration_steps:
            self._choose()

    def _choose(self) -> None:
        """The `share` of all parameters with the largest sums; ties at the border are kept."""
        import torch

        everything = torch.cat([square.flatten() for square in self._squares.values()])
        count = max(1, round(self._share * everything.numel()))
        border = everything.kthvalue(everything.numel() - count + 1).values
        self._masks = {
            name: (square >= border) & (square > 0) for name, square in self._squares.items()
        }
        self._squares = {}

    def after_clip(self, gradients: Mapping[str, Tensor], step: int) -> None:
        for name, mask in self._masks.items():
            gradients[name].mul_(mask)

    def state(self) -> dict[str, Tensor]:
        return dict(self._masks)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._masks = dict(state)


ENTRY: type[Adapter] = ChildTuning
