"""GraLoRA: low-rank updates per block of the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.adapters._tuner import LayeredConfig, Tuner, divides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class GraloraConfig(LayeredConfig):
    r: int = Field(32, ge=1, le=1024, description="Rank; divisible by gralora_k.")
    hybrid_r: int = Field(0, ge=0, le=1024, description="Rank of a plain LoRA beside it.")
    alpha: int = Field(64, ge=1, description="The update is scaled by alpha / (r + hybrid_r).")
    gralora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    gralora_k: int = Field(
        2,
        ge=1,
        description="Blocks per side; divides r and the in and out features of all targets.",
    )

    @model_validator(mode="after")
    def _rank_splits(self) -> GraloraConfig:
        if self.r % self.gralora_k:
            raise ValueError(f"r: {self.r} is not divisible by gralora_k, {self.gralora_k}")
        return self


class Gralora(Tuner):
    name: ClassVar[str] = "gralora"
    title: ClassVar[str] = "GraLoRA"
    summary: ClassVar[str] = (
        "Gives each of k by k blocks of a weight a low-rank update of its own at LoRA's price."
    )
    paper: ClassVar[str | None] = (
        "Jung et al.: GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine- "
        "Tuning, 2025, arXiv 2505.20355"
    )
    Config: ClassVar[type[EntryConfig]] = GraloraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "gralora", "r": 16, "alpha": 32}
    default_learning_rate: ClassVar[float] = 2e-4
    peft_config: ClassVar[str] = "GraloraConfig"

    def per_linear(self, config: GraloraConfig, linear: Linear) -> int:
        """As LoRA of rank r + hybrid_r."""
        divides("gralora_k", config.gralora_k, linear, ("inputs", "outputs"))
        return (config.r + config.hybrid_r) * (linear.inputs + linear.outputs)


ENTRY: type[Adapter] = Gralora
