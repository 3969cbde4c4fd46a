"""DEFT: part of each weight is projected out and replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class DeftConfig(LayeredConfig):
    r: int = Field(8, ge=1, le=1024, description="Rank of the subspace.")
    decomposition_method: Literal["relu", "qr"] = Field(
        "relu",
        description="How the projector follows from the learned directions; qr makes it "
        "orthogonal.",
    )
    init_scale: float = Field(1.0, gt=0, description="Scale of the injected matrix at the start.")
    alpha: int | None = Field(
        None,
        ge=1,
        description="The injected part is scaled by alpha / r; null: not at all.",
    )
    deft_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )


class Deft(Tuner):
    name: ClassVar[str] = "deft"
    title: ClassVar[str] = "DEFT"
    summary: ClassVar[str] = (
        "Removes a learned low-rank subspace from each weight and injects new content there."
    )
    paper: ClassVar[str | None] = (
        "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, 2025, NeurIPS"
    )
    Config: ClassVar[type[EntryConfig]] = DeftConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "deft", "r": 8}
    default_learning_rate: ClassVar[float] = 2e-4
    peft_config: ClassVar[str] = "DeftConfig"

    def per_linear(self, config: DeftConfig, linear: Linear) -> int:
        """Directions of the outputs and their replacement: r (in + out)."""
        return config.r * (linear.inputs + linear.outputs)


ENTRY: type[Adapter] = Deft
