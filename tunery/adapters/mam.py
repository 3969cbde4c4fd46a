"""MAM: prefix tuning and a parallel adapter, each where it does most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters import _peft
from tunery.adapters._feedforward import attention_linear, feedforward_of
from tunery.adapters._targets import paths_by_tail
from tunery.entries import EntryConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import Adapter, ModelShape
    from tunery.training.types import AdapterRun


class MamConfig(EntryConfig):
    num_virtual_tokens: int = Field(
        30, ge=1, le=1024, description="Learned keys and values in front of each layer's own."
    )
    bottleneck: int = Field(
        512, ge=1, le=8192, description="Width of the adapter beside each feed-forward."
    )
    scaling: float = Field(
        4.0, gt=0, le=100, description="Multiplies what that adapter adds; 4 in the paper."
    )


class Mam:
    name: ClassVar[str] = "mam"
    title: ClassVar[str] = "MAM adapter"
    summary: ClassVar[str] = (
        "Mixes a short prefix in the attention with a wide adapter parallel to the feed-forward."
    )
    paper: ClassVar[str | None] = (
        "He et al.: Towards a Unified View of Parameter-Efficient Transfer Learning, 2021, "
        "arXiv 2110.04366"
    )
    Config: ClassVar[type[EntryConfig]] = MamConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "mam",
        "num_virtual_tokens": 30,
        "bottleneck": 256,
    }
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.BY_BLOCK
    default_learning_rate: ClassVar[float] = 5e-4
    mergeable: ClassVar[bool] = False
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: MamConfig, shape: ModelShape) -> int:
        """Per layer: 2 n keys and values of width k, and 2 d m weights and m + d biases."""
        feedforward_of(shape.model_type)
        attention_linear(shape.model_type)
        prefix = 2 * config.num_virtual_tokens * shape.num_key_value_heads * shape.head_dim
        d, m = shape.hidden_size, config.bottleneck
        per_layer = prefix + 2 * d * m + m + d
        return shape.num_hidden_layers * per_layer + _peft.head_parameters(shape)

    def starts_as_base(self, config: MamConfig) -> bool:
        """Never: even keys and values of zero draw attention away from the input."""
        return False

    def base_when_disabled(self, config: MamConfig) -> bool:
        return True

    def apply(self, config: MamConfig, run: AdapterRun) -> Any:
        """A `PeftModel`, whose adapter loads with PEFT once `tunery.adapters` is imported.

        Raises:
            InvalidConfig: where the family's attention or feed-forward lies is not known.
        """
        from tunery.training.tuners.mam import MamConfig as Saved

        kind = run.model.config.model_type
        tails = (attention_linear(kind), *feedforward_of(kind))
        attention, inputs, outputs = (paths_by_tail(run.model, tail) for tail in tails)
        return _peft.wrap(
            run,
            Saved(
                task_type=run.task_type,
                attention_modules=attention,
                input_modules=inputs,
                output_modules=outputs,
                target_modules=[*attention, *inputs, *outputs],
                modules_to_save=_peft.saved_modules(run),
                **config.model_dump(),
            ),
        )


ENTRY: type[Adapter] = Mam
