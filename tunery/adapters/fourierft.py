"""FourierFT: sparse updates in the frequency domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, at_most

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class FourierftConfig(LayeredConfig):
    n_frequency: int = Field(
        1000,
        ge=1,
        description="Learned frequencies per module; at most its in times out features.",
    )
    scaling: float = Field(150.0, gt=0, description="Scale of the update; 100 to 300 are usual.")
    init_weights: bool = Field(
        False,
        description="Start from a spectrum of zeros, as the base; else from a normal one.",
    )


class Fourierft(Tuner):
    name: ClassVar[str] = "fourierft"
    title: ClassVar[str] = "FourierFT"
    summary: ClassVar[str] = (
        "Learns a few entries of the update's spectrum; a Fourier transform makes it a matrix."
    )
    paper: ClassVar[str | None] = (
        "Gao et al.: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, 2024, "
        "arXiv 2405.03003"
    )
    Config: ClassVar[type[EntryConfig]] = FourierftConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "fourierft",
        "n_frequency": 256,
        "init_weights": True,
    }
    default_learning_rate: ClassVar[float] = 1e-2
    peft_config: ClassVar[str] = "FourierFTConfig"
    seed_field: ClassVar[str | None] = "random_loc_seed"

    def per_linear(self, config: FourierftConfig, linear: Linear) -> int:
        """n_frequency."""
        at_most("n_frequency", config.n_frequency, linear.inputs * linear.outputs, linear)
        return config.n_frequency

    def starts_as_base(self, config: FourierftConfig) -> bool:
        return config.init_weights


ENTRY: type[Adapter] = Fourierft
