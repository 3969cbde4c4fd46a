"""HRA: chains of Householder reflections of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class HraConfig(LayeredConfig):
    r: int = Field(
        8,
        ge=1,
        le=1024,
        description="Reflections per module; even, so that they cancel out in pairs at the start.",
    )
    apply_GS: bool = Field(  # noqa: N815 - PEFT's name
        False,
        description="Keep the reflections orthogonal to each other by Gram-Schmidt.",
    )

    @field_validator("r")
    @classmethod
    def _in_pairs(cls, r: int) -> int:
        if r % 2:
            raise ValueError(
                "an odd number of reflections does not start as the base: give an even r"
            )
        return r


class Hra(Tuner):
    name: ClassVar[str] = "hra"
    title: ClassVar[str] = "HRA"
    summary: ClassVar[str] = "Multiplies each weight by a chain of learned Householder reflections."
    paper: ClassVar[str | None] = (
        "Yuan, Liu, Xu: Bridging The Gap between Low-rank and Orthogonal Adaptation via "
        "Householder Reflection Adaptation, 2024, arXiv 2405.17484"
    )
    Config: ClassVar[type[EntryConfig]] = HraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "hra", "r": 8}
    default_learning_rate: ClassVar[float] = 1e-3
    peft_config: ClassVar[str] = "HRAConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: HraConfig, linear: Linear) -> int:
        """A vector of the module's inputs per reflection."""
        return config.r * linear.inputs


ENTRY: type[Adapter] = Hra
