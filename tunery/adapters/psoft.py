"""PSOFT: rotations within each weight's principal subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters._tuner import LayeredConfig, Tuner, at_most

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class PsoftConfig(LayeredConfig):
    r: int = Field(
        32,
        ge=1,
        le=1024,
        description="Directions of the subspace; at most the shorter side of all targets.",
    )
    psoft_alpha: int = Field(32, ge=1, description="The update is scaled by psoft_alpha / r.")
    psoft_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    ab_svd_init: Literal["psoft_init", "pissa_init"] = Field(
        "psoft_init",
        description="How the singular values are shared out between the two frozen factors.",
    )
    psoft_orth: bool = Field(
        True,
        description="Keep the transformation orthogonal; else any r by r matrix.",
    )
    psoft_mag_b: bool = Field(True, description="Learn a scale per direction after it.")
    psoft_mag_a: bool = Field(True, description="Learn a scale per direction before it.")


class Psoft(Tuner):
    name: ClassVar[str] = "psoft"
    title: ClassVar[str] = "PSOFT"
    summary: ClassVar[str] = (
        "Rotates and scales each weight within the subspace of its leading singular directions."
    )
    paper: ClassVar[str | None] = (
        "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, 2025, OpenReview "
        "FSHrinMArK"
    )
    Config: ClassVar[type[EntryConfig]] = PsoftConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "psoft", "r": 16, "psoft_alpha": 16}
    default_learning_rate: ClassVar[float] = 5e-4
    peft_config: ClassVar[str] = "PsoftConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: PsoftConfig, linear: Linear) -> int:
        """A rotation of r directions, or a free r by r matrix, and up to two scales."""
        at_most("r", config.r, min(linear.inputs, linear.outputs), linear)
        r = config.r
        matrix = r * (r - 1) // 2 if config.psoft_orth else r * r
        return matrix + r * (config.psoft_mag_a + config.psoft_mag_b)


ENTRY: type[Adapter] = Psoft
