"""AdaLoRA: LoRA in the form of an SVD, whose ranks move to where they matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.adapters._tuner import LayeredConfig, Tuner
from tunery.errors import InvalidConfig
from tunery.training.hooks import StepHook

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig
    from tunery.training.hooks import StepsRun

_UNTIL_KNOWN = 1_000_000_000
"""PEFT wants the number of steps when the adapter is made; the run tells it to the hook."""


class AdaloraConfig(LayeredConfig):
    target_r: int = Field(8, ge=1, le=1024, description="Mean rank at the end.")
    init_r: int = Field(12, ge=1, le=1024, description="Rank of every module at the start.")
    lora_alpha: int = Field(8, ge=1, description="The update is scaled by lora_alpha / init_r.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped in training."
    )
    tinit: int = Field(0, ge=0, description="Steps before ranks are taken away.")
    tfinal: int = Field(0, ge=0, description="Steps at the end for which the ranks stay.")
    deltaT: int = Field(  # noqa: N815 - PEFT's name
        1, ge=1, description="Steps from one allocation of ranks to the next."
    )
    beta1: float = Field(0.85, gt=0, lt=1, description="Decay of the mean importance.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Decay of its mean deviation.")
    orth_reg_weight: float = Field(
        0.5, ge=0, description="Weight of the penalty that keeps the singular vectors orthogonal."
    )

    @model_validator(mode="after")
    def _ranks_are_taken_away(self) -> AdaloraConfig:
        if self.target_r > self.init_r:
            raise ValueError("target_r: more than init_r; ranks are only taken away")
        return self


class Adalora(Tuner):
    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    summary: ClassVar[str] = (
        "Starts LoRA with spare rank and takes it away where it matters least, step by step."
    )
    paper: ClassVar[str | None] = (
        "Zhang et al.: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, "
        "arXiv 2303.10512"
    )
    Config: ClassVar[type[EntryConfig]] = AdaloraConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "adalora",
        "target_r": 4,
        "init_r": 6,
        "lora_alpha": 16,
    }
    default_learning_rate: ClassVar[float] = 1e-3
    peft_config: ClassVar[str] = "AdaLoraConfig"
    fixed: ClassVar[Mapping[str, Any]] = {"total_step": _UNTIL_KNOWN}
    strategies: ClassVar[frozenset[str] | None] = frozenset({"single", "ddp"})
    half_precision: ClassVar[bool] = False
    """Ranks are taken away in place, which half precision's float32 masters would not notice."""

    def per_linear(self, config: AdaloraConfig, linear: Linear) -> int:
        """Both sides' vectors and the singular values, before any is taken away."""
        return config.init_r * (linear.inputs + linear.outputs + 1)

    def hook(self, config: AdaloraConfig, run: StepsRun) -> StepHook:
        """Adds the penalty's gradient, and allocates ranks after each update.

        Raises:
            InvalidConfig: no step is left between tinit and tfinal.
        """
        if config.tinit >= run.total_steps - config.tfinal:
            raise InvalidConfig(
                f"tinit {config.tinit} and tfinal {config.tfinal} leave none of the run's "
                f"{run.total_steps} steps to take ranks away in",
                param="tinit",
            )
        return _Ranks(run.model, run.total_steps)


class _Ranks(StepHook):
    """PEFT's rank allocator, called as its documentation says, and remembered over a resume.

    The penalty is here too: PEFT adds it to the loss that the model returns, and the trainer's loss
    is computed outside of the model.
    """

    def __init__(self, model: Any, total_steps: int) -> None:
        self._model = model.base_model.model
        self._config = model.peft_config[model.active_adapter]
        self._config.total_step = total_steps
        self._allocator = model.base_model.rankallocator
        self._last = total_steps - self._config.tfinal

    def before_clip(self, gradients: Mapping[str, Tensor]) -> None:
        """Adds the gradient of orth_reg_weight times the sides' mean distance from orthonormal."""
        import torch

        sides = {n: p for n, p in self._sides().items() if n in gradients}
        if not self._config.orth_reg_weight or not sides:
            return
        with torch.enable_grad():
            penalty = torch.stack([_skew(name, side) for name, side in sides.items()]).mean()
            found = torch.autograd.grad(self._config.orth_reg_weight * penalty, [*sides.values()])
        for name, slope in zip(sides, found, strict=True):
            gradients[name].add_(slope)

    def _sides(self) -> dict[str, Tensor]:
        """Both sides' singular vectors by their names in the whole model."""
        return {
            f"base_model.model.{name}": parameter
            for name, parameter in self._model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        }

    def after_update(self, step: int) -> None:
        if step > self._last:
            self._allocator.mask_using_rank_pattern(self._model, self._config.rank_pattern)
            return
        _, pattern = self._allocator.update_and_allocate(
            self._model, step, force_mask=step == self._last
        )
        # An export leaves out what the pattern masks: exact only where it has just been masked.
        self._config.rank_pattern = pattern

    def state(self) -> dict[str, Tensor]:
        import torch

        kept = {
            f"{part}/{name}": tensor
            for part in _PARTS
            for name, tensor in getattr(self._allocator, part).items()
        }
        for name, mask in (self._config.rank_pattern or {}).items():
            kept[f"{_PATTERN}/{name}"] = torch.tensor(mask, dtype=torch.bool)
        return kept

    def load(self, state: Mapping[str, Tensor]) -> None:
        device = next(self._model.parameters()).device
        pattern = {}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            if part == _PATTERN:
                pattern[name] = tensor.tolist()
            else:
                getattr(self._allocator, part)[name] = tensor.to(device)
        self._config.rank_pattern = pattern or None


_PARTS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What the allocator remembers of each parameter's importance, by its own names."""
_PATTERN = "rank_pattern"


def _skew(name: str, side: Tensor) -> Tensor:
    """How far the rows of A, or the columns of B, are from orthonormal."""
    import torch

    product = side @ side.T if "lora_A" in name else side.T @ side
    distance: Tensor = torch.linalg.matrix_norm(
        product - torch.eye(len(product), device=side.device)
    )
    return distance


ENTRY: type[Adapter] = Adalora
