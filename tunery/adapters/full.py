"""All parameters train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunery.adapters._peft import head_parameters
from tunery.entries import Adapter, EntryConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import ModelShape
    from tunery.training.types import AdapterRun


class FullConfig(EntryConfig):
    """Nothing to choose."""


class Full:
    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    summary: ClassVar[str] = "Trains every parameter; the result is a whole model."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = FullConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "full"}
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = None
    default_learning_rate: ClassVar[float] = 2e-5
    mergeable: ClassVar[bool] = False
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: FullConfig, shape: ModelShape) -> int:
        """All of the base's, and the classification head where there is one."""
        return shape.parameters + head_parameters(shape)

    def starts_as_base(self, config: FullConfig) -> bool:
        return True

    def base_when_disabled(self, config: FullConfig) -> bool:
        return False

    def apply(self, config: FullConfig, run: AdapterRun) -> Any:
        """The model itself, with every parameter requiring gradients."""
        return run.model.requires_grad_(True)


ENTRY: type[Adapter] = Full
