"""VeRA: shared random projections, scaled by learned vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class VeraConfig(LayeredConfig):
    r: int = Field(
        256,
        ge=1,
        le=8192,
        description="Rank of the shared random matrices; more than LoRA has, for it costs r "
        "scalars a module.",
    )
    vera_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    d_initial: float = Field(0.1, description="Start of the vector between the two matrices.")
    save_projection: bool = Field(
        True,
        description="Keep the random matrices in the result, which then loads alike everywhere.",
    )


class Vera(Tuner):
    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    summary: ClassVar[str] = (
        "Scales frozen random low-rank matrices, shared by all modules, by learned vectors."
    )
    paper: ClassVar[str | None] = (
        "Kopiczko, Blankevoort, Asano: VeRA: Vector-based Random Matrix Adaptation, 2023, arXiv "
        "2310.11454"
    )
    Config: ClassVar[type[EntryConfig]] = VeraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "vera", "r": 64}
    default_learning_rate: ClassVar[float] = 4e-3
    peft_config: ClassVar[str] = "VeraConfig"
    seed_field: ClassVar[str | None] = "projection_prng_key"
    half_precision: ClassVar[bool] = False

    def per_linear(self, config: VeraConfig, linear: Linear) -> int:
        """A vector of r and one of the outputs."""
        return config.r + linear.outputs


ENTRY: type[Adapter] = Vera
