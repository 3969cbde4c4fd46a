"""LoRA-FA: LoRA whose A stays as it was drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner
from tunery.training.hooks import StepHook

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig
    from tunery.training.hooks import StepsRun
    from tunery.training.types import AdapterRun


class LoraFaConfig(LayeredConfig):
    r: int = Field(8, ge=1, le=1024, description="Rank: columns of B, which train.")
    lora_alpha: int = Field(
        8,
        ge=1,
        description="The update is scaled by lora_alpha / r, or / sqrt(r) with use_rslora.",
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped in training."
    )
    use_rslora: bool = Field(
        False, description="Scale by lora_alpha / sqrt(r): steadier at high ranks."
    )


class LoraFa(Tuner):
    name: ClassVar[str] = "lora_fa"
    title: ClassVar[str] = "LoRA-FA"
    summary: ClassVar[str] = (
        "LoRA that trains B alone, with half the parameters and less memory for activations."
    )
    paper: ClassVar[str | None] = (
        "Zhang et al.: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models "
        "Fine-tuning, 2023, arXiv 2308.03303"
    )
    Config: ClassVar[type[EntryConfig]] = LoraFaConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "lora_fa", "r": 16, "lora_alpha": 32}
    default_learning_rate: ClassVar[float] = 2e-4
    peft_config: ClassVar[str] = "LoraConfig"
    strategies: ClassVar[frozenset[str] | None] = frozenset({"single", "ddp"})
    half_precision: ClassVar[bool] = False

    def per_linear(self, config: LoraFaConfig, linear: Linear) -> int:
        """B: r times out."""
        return config.r * linear.outputs

    def apply(self, config: LoraFaConfig, run: AdapterRun) -> Any:
        """A `PeftModel` with LoRA layers whose A is frozen; PEFT and others load it as LoRA."""
        model = super().apply(config, run)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return model

    def hook(self, config: LoraFaConfig, run: StepsRun) -> StepHook:
        """Corrects B's gradient for what A cannot do."""
        return _FrozenA(run.model)


class _FrozenA(StepHook):
    """B's gradient times (A A')^-1 / scaling^2, after clipping.

    Of all updates that B can make with A as it is, the one whose effect on the weight is nearest to
    the weight's own gradient (Zhang et al., 2023, arXiv 2308.03303; PEFT's LoraFAOptimizer).
    """

    def __init__(self, model: Any) -> None:
        import torch

        self._corrections: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            if "default" not in getattr(module, "lora_A", {}):
                continue
            rows = module.lora_A["default"].weight.detach().float()
            inverse = torch.linalg.pinv(rows @ rows.T + 1e-8 * torch.eye(len(rows)).to(rows))
            name = f"{path}.lora_B.default.weight"
            self._corrections[name] = inverse / module.scaling["default"] ** 2

    def after_clip(self, gradients: Mapping[str, Tensor], step: int) -> None:
        for name, correction in self._corrections.items():
            gradients[name].copy_(gradients[name] @ correction)


ENTRY: type[Adapter] = LoraFa
