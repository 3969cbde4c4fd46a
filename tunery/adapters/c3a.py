"""C3A: block-circulant updates, applied by convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, divides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class C3aConfig(LayeredConfig):
    block_size: int = Field(
        256,
        ge=1,
        description="Side of a block: divides in and out features of all targets.",
    )
    init_weights: Literal[True, "gaussian", "kaiming_uniform", "xavier_uniform"] = Field(
        "xavier_uniform",
        description="How the kernels start; true: zero, as the only one that leaves the base as "
        "it is.",
    )


class C3a(Tuner):
    name: ClassVar[str] = "c3a"
    title: ClassVar[str] = "C3A"
    summary: ClassVar[str] = (
        "Adds a matrix of circulant blocks, so that rank and number of parameters part ways."
    )
    paper: ClassVar[str | None] = (
        "Chen et al.: Parameter-Efficient Fine-Tuning via Circular Convolution, 2024, arXiv "
        "2407.19342"
    )
    Config: ClassVar[type[EntryConfig]] = C3aConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "c3a", "block_size": 16, "init_weights": True}
    default_learning_rate: ClassVar[float] = 1e-2
    peft_config: ClassVar[str] = "C3AConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: C3aConfig, linear: Linear) -> int:
        """in times out over the block size."""
        divides("block_size", config.block_size, linear, ("inputs", "outputs"))
        return linear.inputs * linear.outputs // config.block_size

    def starts_as_base(self, config: C3aConfig) -> bool:
        return config.init_weights is True


ENTRY: type[Adapter] = C3a
