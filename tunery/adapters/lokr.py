"""LoKr: the Kronecker product of a small and a low-rank matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class LokrConfig(LayeredConfig):
    r: int = Field(
        8,
        ge=1,
        le=1024,
        description="Rank of the larger factor; a factor too small for it is kept whole.",
    )
    alpha: int = Field(8, ge=1, description="The update is scaled by alpha / r.")
    rank_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the rank dimensions dropped in training.",
    )
    module_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of steps in which a module's update is left out in training.",
    )
    decompose_both: bool = Field(
        False,
        description="Make the smaller factor low-rank too, where it is large enough.",
    )
    decompose_factor: int = Field(
        -1,
        ge=-1,
        description="Side of the smaller factor; -1: near the square root of the features.",
    )
    rank_dropout_scale: bool = Field(False, description="Scale up what rank_dropout leaves.")

    @field_validator("decompose_factor")
    @classmethod
    def _not_zero(cls, factor: int) -> int:
        if factor == 0:
            raise ValueError("a side has at least 1 row; -1 lets PEFT choose")
        return factor


class Lokr(Tuner):
    name: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    summary: ClassVar[str] = (
        "Adds the Kronecker product of two small matrices, the larger one of low rank."
    )
    paper: ClassVar[str | None] = (
        "Yeh et al.: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model "
        "Evaluation, 2023, arXiv 2309.14859"
    )
    Config: ClassVar[type[EntryConfig]] = LokrConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "lokr", "r": 8, "alpha": 16}
    default_learning_rate: ClassVar[float] = 1e-3
    peft_config: ClassVar[str] = "LoKrConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: LokrConfig, linear: Linear) -> int:
        """Both Kronecker factors, each whole or as a product of rank r."""
        in_small, in_large = _factors(linear.inputs, config.decompose_factor)
        out_small, out_large = _factors(linear.outputs, config.decompose_factor)
        r = config.r
        split = config.decompose_both and r < max(out_small, in_small) / 2
        small = r * (out_small + in_small) if split else out_small * in_small
        whole = r >= max(out_large, in_large) / 2
        large = out_large * in_large if whole else r * (out_large + in_large)
        return small + large


def _factors(features: int, factor: int) -> tuple[int, int]:
    """Two factors of `features`, the smaller first: `factor` if it divides, else the pair with the
    least sum whose smaller part is at most `factor` (-1: any)."""
    if factor > 0 and features % factor == 0:
        return factor, features // factor
    limit = features if factor == -1 else factor
    small = max(n for n in range(1, math.isqrt(features) + 1) if features % n == 0 and n <= limit)
    return small, features // small


ENTRY: type[Adapter] = Lokr
