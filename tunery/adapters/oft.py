"""OFT: the input of each module is rotated in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, divides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class OftConfig(LayeredConfig):
    oft_block_size: int = Field(
        32,
        ge=2,
        description="Side of a block; divides the in features of all targets.",
    )
    module_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of blocks left as they are in training.",
    )
    coft: bool = Field(False, description="Constrain the rotations to a ball around the identity.")
    eps: float = Field(6e-05, gt=0, description="Radius of that ball.")
    block_share: bool = Field(False, description="One block for all places along a module's input.")
    use_cayley_neumann: bool = Field(
        True,
        description="Approximate the inverse in the rotation by a series: faster, a little less "
        "orthogonal.",
    )
    num_cayley_neumann_terms: int = Field(5, ge=1, le=64, description="Terms of that series.")


class Oft(Tuner):
    name: ClassVar[str] = "oft"
    title: ClassVar[str] = "OFT"
    summary: ClassVar[str] = (
        "Rotates the inputs of each module by a learned block-diagonal orthogonal matrix."
    )
    paper: ClassVar[str | None] = (
        "Qiu et al.: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, arXiv "
        "2306.07280"
    )
    Config: ClassVar[type[EntryConfig]] = OftConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "oft", "oft_block_size": 16}
    default_learning_rate: ClassVar[float] = 5e-4
    peft_config: ClassVar[str] = "OFTConfig"
    fixed: ClassVar[Mapping[str, Any]] = {"r": 0}
    transposed: ClassVar[bool] = False

    def per_linear(self, config: OftConfig, linear: Linear) -> int:
        """A skew-symmetric matrix per block, or one in all with block_share."""
        size = config.oft_block_size
        divides("oft_block_size", size, linear, ("inputs",))
        blocks = 1 if config.block_share else linear.inputs // size
        return blocks * size * (size - 1) // 2


ENTRY: type[Adapter] = Oft
