"""SHiRA: a fixed random selection of each weight's entries trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters._tuner import Tuner, TunerConfig, at_most

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig
    from tunery.training.types import AdapterRun


class ShiraConfig(TunerConfig):
    r: int = Field(
        32,
        ge=1,
        le=1024,
        description="As many entries train as LoRA of this rank has parameters.",
    )


class Shira(Tuner):
    name: ClassVar[str] = "shira"
    title: ClassVar[str] = "SHiRA"
    summary: ClassVar[str] = "Trains a sparse random selection of each weight's entries."
    paper: ClassVar[str | None] = (
        "Bhardwaj et al.: Sparse High Rank Adapters, 2024, arXiv 2406.13175"
    )
    Config: ClassVar[type[EntryConfig]] = ShiraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "shira", "r": 4}
    default_learning_rate: ClassVar[float] = 5e-4
    peft_config: ClassVar[str] = "ShiraConfig"
    seed_field: ClassVar[str | None] = "random_seed"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: ShiraConfig, linear: Linear) -> int:
        """r (in + out), which must not be more than the weight has."""
        inputs, outputs = linear.inputs, linear.outputs
        at_most("r", config.r, inputs * outputs // (inputs + outputs), linear)
        return config.r * (inputs + outputs)

    def apply(self, config: ShiraConfig, run: AdapterRun) -> Any:
        """As the other tuners'; torch is told its default for sparse tensors, or it would warn."""
        import torch

        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        return super().apply(config, run)


ENTRY: type[Adapter] = Shira
