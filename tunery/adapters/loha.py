"""LoHa: the Hadamard product of two low-rank updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class LohaConfig(LayeredConfig):
    r: int = Field(8, ge=1, le=1024, description="Rank of each of the two factors.")
    alpha: int = Field(8, ge=1, description="The update is scaled by alpha / r.")
    rank_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the rank dimensions dropped in training.",
    )
    module_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of steps in which a module's update is left out in training.",
    )


class Loha(Tuner):
    name: ClassVar[str] = "loha"
    title: ClassVar[str] = "LoHa"
    summary: ClassVar[str] = (
        "Adds the elementwise product of two low-rank matrices, of rank up to r squared."
    )
    paper: ClassVar[str | None] = (
        "Hyeon-Woo, Ye-Bin, Oh: FedPara: Low-Rank Hadamard Product for Communication-Efficient "
        "Federated Learning, 2021, arXiv 2108.06098"
    )
    Config: ClassVar[type[EntryConfig]] = LohaConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "loha", "r": 8, "alpha": 16}
    default_learning_rate: ClassVar[float] = 5e-4
    peft_config: ClassVar[str] = "LoHaConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: LohaConfig, linear: Linear) -> int:
        """Two pairs of low-rank factors: 2 r (in + out)."""
        return 2 * config.r * (linear.inputs + linear.outputs)


ENTRY: type[Adapter] = Loha
