"""BOFT: rotations by butterfly-factorised orthogonal matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, divides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig
    from tunery.training.types import AdapterRun


class BoftConfig(LayeredConfig):
    boft_block_size: int = Field(
        4,
        ge=2,
        description="Side of a block; divides the in features of all targets.",
    )
    boft_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of blocks left as they are in training.",
    )


class Boft(Tuner):
    name: ClassVar[str] = "boft"
    title: ClassVar[str] = "BOFT"
    summary: ClassVar[str] = (
        "Rotates each weight by products of sparse orthogonal matrices and scales its outputs."
    )
    paper: ClassVar[str | None] = (
        "Liu et al.: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, "
        "2023, arXiv 2311.06243"
    )
    Config: ClassVar[type[EntryConfig]] = BoftConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "boft", "boft_block_size": 4}
    default_learning_rate: ClassVar[float] = 5e-4
    peft_config: ClassVar[str] = "BOFTConfig"
    fixed: ClassVar[Mapping[str, Any]] = {"boft_n_butterfly_factor": 1}
    transposed: ClassVar[bool] = False

    def per_linear(self, config: BoftConfig, linear: Linear) -> int:
        """Whole blocks along the input, and a scale per output."""
        divides("boft_block_size", config.boft_block_size, linear, ("inputs",))
        return linear.inputs * config.boft_block_size + linear.outputs

    def apply(self, config: BoftConfig, run: AdapterRun) -> Any:
        """As the other tuners', without the CUDA kernel that PEFT would compile at first use.

        It speeds up products of several butterfly factors; here there is one.
        """
        from peft.tuners.boft import layer

        layer.get_fbd_cuda = _no_kernel
        return super().apply(config, run)


def _no_kernel() -> None:
    """What PEFT's loader returns where the kernel cannot be had."""


ENTRY: type[Adapter] = Boft
