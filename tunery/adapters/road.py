"""RoAd: outputs rotated in the plane, pair by pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters._tuner import Tuner, TunerConfig, divides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class RoadConfig(TunerConfig):
    variant: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1",
        description="How many angles and scales a pair of outputs has: 1, 2 or 4 of each.",
    )
    group_size: int = Field(
        64,
        ge=2,
        multiple_of=2,
        description="Outputs within which the pairs are formed, first half with second; even, "
        "and divides the out features of all targets.",
    )


class Road(Tuner):
    name: ClassVar[str] = "road"
    title: ClassVar[str] = "RoAd"
    summary: ClassVar[str] = "Rotates and scales pairs of each module's outputs."
    paper: ClassVar[str | None] = (
        "Liao, Monz: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching "
        "and Composability, 2024, arXiv 2409.00119"
    )
    Config: ClassVar[type[EntryConfig]] = RoadConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "road", "group_size": 16}
    default_learning_rate: ClassVar[float] = 3e-3
    peft_config: ClassVar[str] = "RoadConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: RoadConfig, linear: Linear) -> int:
        """An angle and a scale each for half, all or twice the outputs."""
        divides("group_size", config.group_size, linear, ("outputs",))
        return 2 * linear.outputs * int(config.variant[-1]) // 2


ENTRY: type[Adapter] = Road
