"""HiRA: low-rank factors times the weight, elementwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class HiraConfig(LayeredConfig):
    r: int = Field(32, ge=1, le=1024, description="Rank of the factors.")
    hira_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )


class Hira(Tuner):
    name: ClassVar[str] = "hira"
    title: ClassVar[str] = "HiRA"
    summary: ClassVar[str] = (
        "Multiplies the weight elementwise by a low-rank matrix, so that the update has high rank."
    )
    paper: ClassVar[str | None] = (
        "Huang et al.: HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large "
        "Language Models, 2025, ICLR"
    )
    Config: ClassVar[type[EntryConfig]] = HiraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "hira", "r": 16}
    default_learning_rate: ClassVar[float] = 2e-3
    peft_config: ClassVar[str] = "HiraConfig"

    def per_linear(self, config: HiraConfig, linear: Linear) -> int:
        """r (in + out)."""
        return config.r * (linear.inputs + linear.outputs)


ENTRY: type[Adapter] = Hira
