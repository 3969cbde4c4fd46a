"""LoRA, with rank-stabilised scaling, DoRA, LoRA+, and PEFT's initialisations that need no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunery.adapters import _peft
from tunery.adapters._targets import (
    ALL_LINEAR,
    by_pattern,
    check_names,
    has_bias,
    layers_of,
    linears_of,
    targets_in,
)
from tunery.entries import Adapter, EntryConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import ModelShape
    from tunery.training.types import AdapterRun

_CHANGES_BASE = frozenset({"pissa", "olora"})
"""Initialisations that take what they put into A and B out of the base's weights."""
_NOT_PEFTS = {"lr_ratio", "target_modules", "modules_to_save"}
"""Fields that PEFT's configuration does not know, or is told otherwise."""


class LoraConfig(EntryConfig):
    r: int = Field(
        16,
        ge=1,
        le=1024,
        description="Rank: columns of B and rows of A. vLLM serves 8 to 512, 16 by default.",
    )
    lora_alpha: int | float = Field(
        32,
        gt=0,
        description="The update is scaled by lora_alpha / r, or / sqrt(r) with use_rslora.",
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped in training."
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        min_length=1,
        description="Linear modules that get an adapter: names such as q_proj, or all of those in "
        "the transformer's blocks.",
    )
    bias: Literal["none", "lora_only"] = Field(
        "none", description="Also train the biases of the adapted modules, where they have any."
    )
    use_rslora: bool = Field(
        False, description="Scale by lora_alpha / sqrt(r): steadier at high ranks."
    )
    use_dora: bool = Field(
        False, description="DoRA: learn each output's magnitude beside the low-rank direction."
    )
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "pissa", "olora"] = Field(
        True,
        description="How A and B start. true: A Kaiming-uniform, B zero. gaussian: A normal, B "
        "zero. orthogonal: both non-zero with BA zero, needs an even r. pissa, olora: the base's "
        "leading directions, taken out of the base; PEFT repeats that when it loads the result, "
        "other servers do not. None of them looks at data.",
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Other ranks by module name, such as down_proj or layers.0.mlp.down_proj.",
    )
    alpha_pattern: dict[str, int | float] = Field(
        default_factory=dict, description="Other lora_alpha by module name."
    )
    lr_ratio: float = Field(
        1.0,
        ge=1,
        le=1024,
        description="LoRA+: B learns at this multiple of the learning rate, 16 in the paper, with "
        "about half of LoRA's own. 1 is LoRA.",
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="Embeddings or heads trained in full beside the adapter, such as lm_head."
    )
    layers_to_transform: tuple[int, ...] | None = Field(
        None, min_length=1, description="Layers, from 0, that get adapters; null: all."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> LoraConfig:
        if self.target_modules != ALL_LINEAR:
            check_names(self.target_modules, "target_modules")
        check_names(self.rank_pattern, "rank_pattern")
        check_names(self.alpha_pattern, "alpha_pattern")
        ranks = [self.r, *self.rank_pattern.values()]
        if not all(1 <= rank <= 1024 for rank in ranks):
            raise ValueError("rank_pattern: ranks are 1 to 1024")
        if any(alpha <= 0 for alpha in self.alpha_pattern.values()):
            raise ValueError("alpha_pattern: values are above 0")
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError("init_lora_weights 'orthogonal' needs even ranks")
        if any(layer < 0 for layer in self.layers_to_transform or ()):
            raise ValueError("layers_to_transform: layers count from 0")
        return self


class Lora:
    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    summary: ClassVar[str] = "Adds a low-rank update to the weights of linear modules."
    paper: ClassVar[str | None] = (
        "Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685"
    )
    Config: ClassVar[type[EntryConfig]] = LoraConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "lora",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
    }
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = None
    default_learning_rate: ClassVar[float] = 2e-4
    mergeable: ClassVar[bool] = True
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: LoraConfig, shape: ModelShape) -> int:
        """Per adapted module of (in, out) features: r (in + out), out more with DoRA or a bias."""
        linears = linears_of(shape, config.target_modules)
        total = 0
        for layer in layers_of(shape, config.layers_to_transform):
            for name, (inputs, outputs) in linears.items():
                rank = by_pattern(config.rank_pattern, layer, name) or config.r
                total += rank * (inputs + outputs)
                total += outputs if config.use_dora else 0
                total += outputs if config.bias == "lora_only" and has_bias(shape, name) else 0
        saved = _peft.saved_parameters(shape, config.modules_to_save)
        return total + saved + _peft.head_parameters(shape)

    def starts_as_base(self, config: LoraConfig) -> bool:
        """True for every initialisation offered: BA is zero, or was taken out of the base."""
        return True

    def base_when_disabled(self, config: LoraConfig) -> bool:
        """Not when the base's own weights were changed or train."""
        return config.init_lora_weights not in _CHANGES_BASE and config.bias == "none"

    def apply(self, config: LoraConfig, run: AdapterRun) -> Any:
        """A `PeftModel` with LoRA layers.

        Raises:
            InvalidConfig: a target or a module to save is not in the model.
        """
        from peft import LoraConfig as PeftLoraConfig

        settings = config.model_dump(include=LoraConfig.model_fields.keys() - _NOT_PEFTS)
        layers = settings.pop("layers_to_transform")
        return _peft.wrap(
            run,
            PeftLoraConfig(
                task_type=run.task_type,
                target_modules=targets_in(run.model, config.target_modules),
                modules_to_save=_peft.saved_modules(run, config.modules_to_save),
                layers_to_transform=list(layers) if layers is not None else None,
                fan_in_fan_out=_peft.fan_in_fan_out(run.model),
                **settings,
            ),
        )

    def rate(self, config: LoraConfig, parameter: str) -> float:
        """lr_ratio for B, 1 for the rest."""
        return config.lr_ratio if ".lora_B." in parameter else 1.0


ENTRY: type[Adapter] = Lora
