"""VB-LoRA: LoRA composed from a bank of shared vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.adapters._tuner import LayeredConfig, Tuner, divides

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class VbloraConfig(LayeredConfig):
    r: int = Field(4, ge=1, le=1024, description="Rank of the update.")
    num_vectors: int = Field(256, ge=2, le=65536, description="Vectors in the bank.")
    vector_length: int = Field(
        256,
        ge=1,
        description="Length of a vector; divides in and out features of all targets.",
    )
    topk: int = Field(2, ge=1, description="Vectors mixed for each piece.")
    vblora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training.",
    )
    init_vector_bank_bound: float = Field(
        0.02,
        gt=0,
        description="The bank starts uniformly within plus and minus this.",
    )
    init_logits_std: float = Field(
        0.1,
        gt=0,
        description="Standard deviation of the mixing logits at the start.",
    )

    @model_validator(mode="after")
    def _as_many_as_there_are(self) -> VbloraConfig:
        if self.topk > self.num_vectors:
            raise ValueError("topk: more than num_vectors")
        return self


class Vblora(Tuner):
    name: ClassVar[str] = "vblora"
    title: ClassVar[str] = "VB-LoRA"
    summary: ClassVar[str] = (
        "Composes the LoRA matrices of all modules from a shared bank of learned vectors."
    )
    paper: ClassVar[str | None] = (
        "Li, Han, Ji: VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, 2024, "
        "arXiv 2405.15179"
    )
    Config: ClassVar[type[EntryConfig]] = VbloraConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "vblora",
        "num_vectors": 64,
        "vector_length": 16,
    }
    default_learning_rate: ClassVar[float] = 1e-3
    peft_config: ClassVar[str] = "VBLoRAConfig"

    def per_linear(self, config: VbloraConfig, linear: Linear) -> int:
        """Logits over the bank for each piece of both matrices."""
        divides("vector_length", config.vector_length, linear, ("inputs", "outputs"))
        pieces = (linear.inputs + linear.outputs) // config.vector_length
        return config.r * pieces * config.num_vectors

    def shared(self, config: VbloraConfig, linears: Sequence[Linear]) -> int:
        """The bank."""
        return config.num_vectors * config.vector_length

    def starts_as_base(self, config: VbloraConfig) -> bool:
        """A and B come from the same bank: neither is zero."""
        return False


ENTRY: type[Adapter] = Vblora
