"""LayerNorm tuning: only the normalisation layers train."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from tunery.adapters import _peft
from tunery.adapters._norms import norms_by_type, norms_of
from tunery.entries import EntryConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import Adapter, ModelShape
    from tunery.training.types import AdapterRun


class LnTuningConfig(EntryConfig):
    """Nothing to choose."""


class LnTuning:
    name: ClassVar[str] = "ln_tuning"
    title: ClassVar[str] = "LayerNorm tuning"
    summary: ClassVar[str] = "Trains the normalisation layers alone: a few vectors per layer."
    paper: ClassVar[str | None] = (
        "Zhao et al.: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, "
        "2023, arXiv 2312.11420"
    )
    Config: ClassVar[type[EntryConfig]] = LnTuningConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "ln_tuning"}
    default_learning_rate: ClassVar[float] = 1e-3
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.BY_BLOCK
    mergeable: ClassVar[bool] = True
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: LnTuningConfig, shape: ModelShape) -> int:
        """A scale per hidden dimension and norm, and a shift where the family has one."""
        norms = norms_of(shape)
        vectors = norms.count(shape.num_hidden_layers) * (2 if norms.bias else 1)
        return vectors * shape.hidden_size + _peft.head_parameters(shape)

    def starts_as_base(self, config: LnTuningConfig) -> bool:
        return True

    def base_when_disabled(self, config: LnTuningConfig) -> bool:
        return True

    def apply(self, config: LnTuningConfig, run: AdapterRun) -> Any:
        """A `PeftModel` with trained copies of the norms.

        Raises:
            InvalidConfig: the family's norms are not known.
        """
        from peft import LNTuningConfig

        norms = norms_by_type(run.model.config.model_type)
        config_of_peft = LNTuningConfig(
            task_type=run.task_type,
            target_modules=[*norms.inside, *norms.outside],
            modules_to_save=_peft.saved_modules(run),
        )
        with warnings.catch_warnings():
            # PEFT asks each norm for its in and out features, and says that it has none.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            return _peft.wrap(run, config_of_peft)


ENTRY: type[Adapter] = LnTuning
