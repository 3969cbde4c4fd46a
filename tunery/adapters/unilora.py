"""Uni-LoRA: one short vector for a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class UniloraConfig(LayeredConfig):
    r: int = Field(4, ge=1, le=1024, description="Rank of the update.")
    theta_d_length: int = Field(256, ge=1, description="Length of the vector.")
    unilora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    init_theta_d_bound: float = Field(
        0.02,
        gt=0,
        description="The vector starts uniformly within plus and minus this.",
    )
    save_indices: bool = Field(
        False,
        description="Keep in the result which entry goes where; else it follows from the seed.",
    )


class Unilora(Tuner):
    name: ClassVar[str] = "unilora"
    title: ClassVar[str] = "Uni-LoRA"
    summary: ClassVar[str] = "Fills the LoRA matrices of all modules from one short learned vector."
    paper: ClassVar[str | None] = "Uni-LoRA: One Vector is All You Need, 2025, arXiv 2506.00799"
    Config: ClassVar[type[EntryConfig]] = UniloraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "unilora", "theta_d_length": 1024}
    default_learning_rate: ClassVar[float] = 5e-3
    peft_config: ClassVar[str] = "UniLoraConfig"
    seed_field: ClassVar[str | None] = "proj_seed"
    half_precision: ClassVar[bool] = False

    def per_linear(self, config: UniloraConfig, linear: Linear) -> int:
        """None of its own."""
        return 0

    def shared(self, config: UniloraConfig, linears: Sequence[Linear]) -> int:
        """The vector."""
        return config.theta_d_length

    def starts_as_base(self, config: UniloraConfig) -> bool:
        """A and B come from the same vector: neither is zero."""
        return False


ENTRY: type[Adapter] = Unilora
