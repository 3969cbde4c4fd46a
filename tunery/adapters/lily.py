"""Lily: low-rank updates whose parts are shared across layers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class LilyConfig(LayeredConfig):
    r: int = Field(32, ge=1, le=1024, description="Rank of the update.")
    stride_A: int = Field(  # noqa: N815 - PEFT's name
        1,
        ge=1,
        description="Layers in a row that share the part next to the input.",
    )
    num_B: int = Field(  # noqa: N815 - PEFT's name
        2,
        ge=2,
        le=256,
        description="Parts next to the output, shared by all layers and mixed per input.",
    )
    scaling: float = Field(1.0, gt=0, description="Scale of the update.")


class Lily(Tuner):
    name: ClassVar[str] = "lily"
    title: ClassVar[str] = "Lily"
    summary: ClassVar[str] = (
        "Shares low-rank parts across layers and lets each input choose how to mix them."
    )
    paper: ClassVar[str | None] = (
        "Zhong et al.: Low-Rank Interconnected Adaptation across Layers, 2024, arXiv 2407.09946"
    )
    Config: ClassVar[type[EntryConfig]] = LilyConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "lily", "r": 16}
    default_learning_rate: ClassVar[float] = 1e-3
    peft_config: ClassVar[str] = "LilyConfig"
    transposed: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    def per_linear(self, config: LilyConfig, linear: Linear) -> int:
        """The router's weights."""
        return config.r * config.num_B

    def shared(self, config: LilyConfig, linears: Sequence[Linear]) -> int:
        """Per kind of module: an A for every stride_A layers, and num_B Bs."""
        layers = Counter(linears)
        return sum(
            -(-count // config.stride_A) * config.r * linear.inputs
            + config.num_B * config.r * linear.outputs
            for linear, count in layers.items()
        )


ENTRY: type[Adapter] = Lily
