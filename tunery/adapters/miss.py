"""MiSS: one matrix, spread over shards of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, at_most, divides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class MissConfig(LayeredConfig):
    r: int = Field(64, ge=1, le=1024, description="Shards of the input, and rows of the matrix.")
    miss_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    mini_r: int = Field(
        1,
        ge=1,
        description="Columns of the matrix with init_weights mini; divides the out features.",
    )
    init_weights: Literal[True, "bat", "mini"] = Field(
        True,
        description="Form of the update. true: r rows of out features. bat: a nonlinear one of "
        "r by r blocks; r divides both sides. mini: r rows of mini_r.",
    )


class Miss(Tuner):
    name: ClassVar[str] = "miss"
    title: ClassVar[str] = "MiSS"
    summary: ClassVar[str] = (
        "Adds a single learned matrix, expanded along the input, that starts from zero."
    )
    paper: ClassVar[str | None] = (
        "Kang, Yin: Balancing LoRA Performance and Efficiency with Simple Shard Sharing, 2024, "
        "arXiv 2409.15371"
    )
    Config: ClassVar[type[EntryConfig]] = MissConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "miss", "r": 16}
    default_learning_rate: ClassVar[float] = 4e-4
    peft_config: ClassVar[str] = "MissConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: MissConfig, linear: Linear) -> int:
        """r times out; r times mini_r in the mini form."""
        at_most("r", config.r, linear.inputs, linear)
        if config.init_weights == "mini":
            divides("mini_r", config.mini_r, linear, ("outputs",))
            return config.r * config.mini_r
        if config.init_weights == "bat":
            divides("r", config.r, linear, ("inputs", "outputs"))
        return config.r * linear.outputs


ENTRY: type[Adapter] = Miss
