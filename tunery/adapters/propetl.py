"""ProPETL: one adapter for all layers, of which each uses a part of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters import _peft
from tunery.adapters._feedforward import feedforward_of, last_linears
from tunery.entries import EntryConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import Adapter, ModelShape
    from tunery.training.types import AdapterRun


class PropetlConfig(EntryConfig):
    bottleneck: int = Field(64, ge=1, le=8192, description="Width of the shared network.")
    kept: float = Field(
        0.5, gt=0, le=1, description="Share of the network's weights that each layer uses."
    )
    activation: Literal["relu", "gelu", "silu"] = Field(
        "relu", description="The network's activation."
    )


class Propetl:
    name: ClassVar[str] = "propetl"
    title: ClassVar[str] = "ProPETL"
    summary: ClassVar[str] = (
        "Shares one bottleneck adapter among all layers, each of which learns which part to use."
    )
    paper: ClassVar[str | None] = (
        "Zeng, Zhang, Lu: One Network, Many Masks: Towards More Parameter-Efficient Transfer "
        "Learning, 2023, arXiv 2305.17682"
    )
    Config: ClassVar[type[EntryConfig]] = PropetlConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "propetl", "bottleneck": 64, "kept": 0.5}
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.BY_BLOCK
    default_learning_rate: ClassVar[float] = 5e-4
    mergeable: ClassVar[bool] = False
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: PropetlConfig, shape: ModelShape) -> int:
        """The network's 2 d m weights, m + d biases, and a score per weight and layer.

        Of the scores the result keeps a mask, one byte each.
        """
        feedforward_of(shape.model_type)
        d, m = shape.hidden_size, config.bottleneck
        scores = shape.num_hidden_layers * 2 * d * m
        return 2 * d * m + m + d + scores + _peft.head_parameters(shape)

    def starts_as_base(self, config: PropetlConfig) -> bool:
        """The network's last matrix starts at zero."""
        return True

    def base_when_disabled(self, config: PropetlConfig) -> bool:
        return True

    def apply(self, config: PropetlConfig, run: AdapterRun) -> Any:
        """A `PeftModel`, whose adapter loads with PEFT once `tunery.adapters` is imported.

        Raises:
            InvalidConfig: where the family's feed-forward lies is not known.
        """
        from tunery.training.tuners.propetl import PropetlConfig as Saved

        return _peft.wrap(
            run,
            Saved(
                task_type=run.task_type,
                target_modules=last_linears(run.model, run.model.config.model_type),
                modules_to_save=_peft.saved_modules(run),
                **config.model_dump(),
            ),
        )


ENTRY: type[Adapter] = Propetl
