"""PVeRA: VeRA with a learned distribution in the middle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class PveraConfig(LayeredConfig):
    r: int = Field(256, ge=1, le=8192, description="Rank of the shared random matrices.")
    pvera_dropout: float = Field(
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


class Pvera(Tuner):
    name: ClassVar[str] = "pvera"
    title: ClassVar[str] = "PVeRA"
    summary: ClassVar[str] = (
        "VeRA whose scaling is drawn, in training, from a learned normal distribution."
    )
    paper: ClassVar[str | None] = (
        "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, 2025, arXiv 2512.07703"
    )
    Config: ClassVar[type[EntryConfig]] = PveraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "pvera", "r": 64}
    default_learning_rate: ClassVar[float] = 4e-3
    peft_config: ClassVar[str] = "PveraConfig"
    seed_field: ClassVar[str | None] = "projection_prng_key"
    half_precision: ClassVar[bool] = False

    def per_linear(self, config: PveraConfig, linear: Linear) -> int:
        """Mean and spread of r each, and a vector of the outputs."""
        return 2 * config.r + linear.outputs


ENTRY: type[Adapter] = Pvera
