"""PEANuT: a small network makes the update from the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class PeanutConfig(LayeredConfig):
    r: int = Field(32, ge=1, le=1024, description="Width of the network.")
    depth: int = Field(0, ge=0, le=16, description="Hidden layers on each side of its middle.")
    act_fn: Literal["relu", "gelu", "silu", "tanh", "sigmoid"] = Field(
        "relu",
        description="Its activation.",
    )
    scaling: float = Field(1.0, gt=0, description="Scale of the update.")


class Peanut(Tuner):
    name: ClassVar[str] = "peanut"
    title: ClassVar[str] = "PEANuT"
    summary: ClassVar[str] = "Learns a small network that turns each frozen weight into its update."
    paper: ClassVar[str | None] = (
        "Zhong et al.: PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural "
        "Tweakers, 2024, arXiv 2410.01870"
    )
    Config: ClassVar[type[EntryConfig]] = PeanutConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "peanut", "r": 16}
    default_learning_rate: ClassVar[float] = 5e-4
    peft_config: ClassVar[str] = "PeanutConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: PeanutConfig, linear: Linear) -> int:
        """Into r, out of r, and 2 depth layers of r by r between."""
        return 2 * config.r * linear.outputs + 2 * config.depth * config.r**2


ENTRY: type[Adapter] = Peanut
