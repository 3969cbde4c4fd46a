"""Super-tuning: the largest entries of each weight train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.adapters._tuner import Tuner, TunerConfig
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class SupertuningConfig(TunerConfig):
    sparsity: float = Field(0.99, ge=0, lt=1, description="Share of the entries that stay frozen.")
    select_top: bool = Field(True, description="Train the largest entries; else the smallest.")
    r: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Rank of the LoRA beside them; null: none.",
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        description="That LoRA is scaled by lora_alpha / r; null: 2 r.",
    )
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of that LoRA's inputs dropped in training.",
    )

    @model_validator(mode="after")
    def _lora_settings_with_lora(self) -> SupertuningConfig:
        if self.r is None and (self.lora_alpha is not None or self.lora_dropout):
            raise ValueError("lora_alpha, lora_dropout: need r")
        return self


class Supertuning(Tuner):
    name: ClassVar[str] = "supertuning"
    title: ClassVar[str] = "Super-Tuning"
    summary: ClassVar[str] = (
        "Trains the entries of largest magnitude of each weight, with a LoRA beside them if asked."
    )
    paper: ClassVar[str | None] = "Super-Tuning, 2026, arXiv 2607.09287"
    Config: ClassVar[type[EntryConfig]] = SupertuningConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "supertuning", "sparsity": 0.95}
    default_learning_rate: ClassVar[float] = 2e-4
    peft_config: ClassVar[str] = "SupertuningConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: SupertuningConfig, linear: Linear) -> int:
        """The entries that are not frozen, and the LoRA's r (in + out)."""
        entries = int(linear.inputs * linear.outputs * (1 - config.sparsity))
        if entries < 1:
            raise InvalidConfig(
                f"sparsity: {config.sparsity} leaves nothing to train of {linear.name}",
                hint="lower it",
                param="sparsity",
            )
        return entries + (config.r or 0) * (linear.inputs + linear.outputs)


ENTRY: type[Adapter] = Supertuning
