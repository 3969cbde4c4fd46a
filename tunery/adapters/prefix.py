"""Prefix tuning: learned keys and values in front of every layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.adapters import _peft
from tunery.entries import Adapter, EntryConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import ModelShape
    from tunery.training.types import AdapterRun


class PrefixConfig(EntryConfig):
    num_virtual_tokens: int = Field(
        20, ge=1, le=1024, description="Learned keys and values per layer."
    )
    prefix_projection: bool = Field(
        False,
        description="Make them from embeddings by a two-layer network, which trains more steadily; "
        "only its outcome is kept in the result.",
    )
    encoder_hidden_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Width of that network; null: the width of a layer's keys.",
    )

    @model_validator(mode="after")
    def _width_only_with_projection(self) -> PrefixConfig:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size: needs prefix_projection")
        return self


class Prefix:
    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "Prefix tuning"
    summary: ClassVar[str] = "Learns keys and values that stand before every layer's own."
    paper: ClassVar[str | None] = (
        "Li, Liang: Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, "
        "arXiv 2101.00190"
    )
    Config: ClassVar[type[EntryConfig]] = PrefixConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "prefix", "num_virtual_tokens": 20}
    tasks: ClassVar[frozenset[str] | None] = frozenset({"text-generation"})
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.UNDIVIDED
    default_learning_rate: ClassVar[float] = 1e-2
    mergeable: ClassVar[bool] = False
    needs_cache: ClassVar[bool] = True
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: PrefixConfig, shape: ModelShape) -> int:
        """n virtual tokens, L layers, keys of width k: 2 n L k; with projection the network's."""
        width = shape.num_key_value_heads * shape.head_dim
        outputs = 2 * shape.num_hidden_layers * width
        n = config.num_virtual_tokens
        if not config.prefix_projection:
            return n * outputs + _peft.head_parameters(shape)
        hidden = config.encoder_hidden_size or width
        network = (width + 1) * hidden + (hidden + 1) * outputs
        return n * width + network + _peft.head_parameters(shape)

    def starts_as_base(self, config: PrefixConfig) -> bool:
        """Never: even keys and values of zero draw attention away from the input."""
        return False

    def base_when_disabled(self, config: PrefixConfig) -> bool:
        return True

    def apply(self, config: PrefixConfig, run: AdapterRun) -> Any:
        """A `PeftModel` with a prefix encoder."""
        from peft import PrefixTuningConfig

        return _peft.wrap(
            run,
            PrefixTuningConfig(
                task_type=run.task_type,
                modules_to_save=_peft.saved_modules(run),
                **config.model_dump(),
            ),
        )


ENTRY: type[Adapter] = Prefix
