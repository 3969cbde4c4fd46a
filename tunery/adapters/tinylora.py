"""TinyLoRA: a vector of a few scalars per module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, at_most

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class TinyloraConfig(LayeredConfig):
    r: int = Field(
        2,
        ge=1,
        le=256,
        description="Singular directions of each weight that the vector acts on.",
    )
    u: int = Field(64, ge=1, le=65536, description="Length of a vector.")
    weight_tying: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How far modules share their vectors, from 0, not at all, to 1, one vector "
        "for all.",
    )
    tinylora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    save_projection: bool = Field(
        True,
        description="Keep the random projections in the result, which then loads alike everywhere.",
    )


class Tinylora(Tuner):
    name: ClassVar[str] = "tinylora"
    title: ClassVar[str] = "TinyLoRA"
    summary: ClassVar[str] = (
        "Projects a tiny learned vector, shared by modules if asked, into each weight's SVD."
    )
    paper: ClassVar[str | None] = "Learning to Reason in 13 Parameters, 2026, arXiv 2602.04118"
    Config: ClassVar[type[EntryConfig]] = TinyloraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "tinylora", "u": 64}
    default_learning_rate: ClassVar[float] = 1e-2
    peft_config: ClassVar[str] = "TinyLoraConfig"
    seed_field: ClassVar[str | None] = "projection_seed"
    half_precision: ClassVar[bool] = False

    def per_linear(self, config: TinyloraConfig, linear: Linear) -> int:
        """All vectors are shared, if only by one module."""
        at_most("r", config.r, min(linear.inputs, linear.outputs), linear)
        return 0

    def shared(self, config: TinyloraConfig, linears: Sequence[Linear]) -> int:
        """u per group of modules in a row."""
        count = len(linears)
        groups = max(1, round(count * (1 - config.weight_tying)))
        size = max(1, count // groups)
        return config.u * min(groups, -(-count // size))


ENTRY: type[Adapter] = Tinylora
