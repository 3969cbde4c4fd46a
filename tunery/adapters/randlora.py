"""RandLoRA: full-rank updates from sums of scaled random bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class RandloraConfig(LayeredConfig):
    r: int = Field(
        32,
        ge=1,
        le=1024,
        description="Rank of a basis: the smaller, the more bases and parameters.",
    )
    randlora_alpha: int = Field(
        640,
        ge=1,
        description="The update is scaled by randlora_alpha / r; 20 r is usual.",
    )
    randlora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    sparse: bool = Field(False, description="Bases of -1, 0 and 1 instead of normal ones.")
    very_sparse: bool = Field(
        False,
        description="The same with still fewer entries that are not 0.",
    )
    save_projection: bool = Field(
        True,
        description="Keep the random bases in the result, which then loads alike everywhere.",
    )


class Randlora(Tuner):
    name: ClassVar[str] = "randlora"
    title: ClassVar[str] = "RandLoRA"
    summary: ClassVar[str] = (
        "Sums frozen random low-rank bases, scaled by learned vectors, to an update of full rank."
    )
    paper: ClassVar[str | None] = (
        "Albert et al.: RandLoRA: Full-rank parameter-efficient fine-tuning of large models, "
        "2025, arXiv 2502.00987"
    )
    Config: ClassVar[type[EntryConfig]] = RandloraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "randlora", "r": 16, "randlora_alpha": 320}
    default_learning_rate: ClassVar[float] = 1e-4
    peft_config: ClassVar[str] = "RandLoraConfig"
    seed_field: ClassVar[str | None] = "projection_prng_key"

    def per_linear(self, config: RandloraConfig, linear: Linear) -> int:
        """Per basis of rank r a vector of r and one of the shorter side."""
        shorter = min(linear.inputs, linear.outputs)
        bases = -(-shorter // config.r)
        return bases * (config.r + shorter)


ENTRY: type[Adapter] = Randlora
