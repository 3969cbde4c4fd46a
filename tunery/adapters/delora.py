"""DeLoRA: low-rank updates of bounded norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class DeloraConfig(LayeredConfig):
    r: int = Field(8, ge=1, le=1024, description="Rank of the update.")
    delora_lambda: int = Field(
        15,
        ge=1,
        description="Start of the learned bound on the norm of the update.",
    )
    module_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of steps in which a module's update is left out in training.",
    )


class Delora(Tuner):
    name: ClassVar[str] = "delora"
    title: ClassVar[str] = "DeLoRA"
    summary: ClassVar[str] = (
        "Normalises a low-rank update and learns its strength apart from its direction."
    )
    paper: ClassVar[str | None] = (
        "Bini, Girrbach, Akata: DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation, "
        "2025, arXiv 2503.18225"
    )
    Config: ClassVar[type[EntryConfig]] = DeloraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "delora", "r": 8}
    default_learning_rate: ClassVar[float] = 1e-3
    peft_config: ClassVar[str] = "DeloraConfig"
    transposed: ClassVar[bool] = False
    half_precision: ClassVar[bool] = False

    def per_linear(self, config: DeloraConfig, linear: Linear) -> int:
        """r (in + out), and the strength."""
        return config.r * (linear.inputs + linear.outputs) + 1


ENTRY: type[Adapter] = Delora
