"""WaveFT: sparse updates in the wavelet domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, at_most

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class WaveftConfig(LayeredConfig):
    n_frequency: int = Field(
        2592,
        ge=1,
        description="Learned coefficients per module; at most its in times out features.",
    )
    scaling: float = Field(25.0, gt=0, description="Scale of the update.")
    use_idwt: bool = Field(
        True,
        description="Transform the coefficients back; else they are the update's entries.",
    )


class Waveft(Tuner):
    name: ClassVar[str] = "waveft"
    title: ClassVar[str] = "WaveFT"
    summary: ClassVar[str] = (
        "Learns a few wavelet coefficients of the update; the inverse transform makes it a matrix."
    )
    paper: ClassVar[str | None] = (
        "Bilican et al.: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, "
        "2025, arXiv 2505.12532"
    )
    Config: ClassVar[type[EntryConfig]] = WaveftConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "waveft", "n_frequency": 256}
    default_learning_rate: ClassVar[float] = 5e-3
    peft_config: ClassVar[str] = "WaveFTConfig"
    seed_field: ClassVar[str | None] = "random_loc_seed"

    def per_linear(self, config: WaveftConfig, linear: Linear) -> int:
        """n_frequency."""
        at_most("n_frequency", config.n_frequency, linear.inputs * linear.outputs, linear)
        return config.n_frequency


ENTRY: type[Adapter] = Waveft
