"""(IA)3: learned vectors that scale keys, values and the feed-forward's hidden activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.adapters import _peft
from tunery.adapters._targets import check_names, linears_of, matches, targets_in
from tunery.entries import Adapter, EntryConfig
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import ModelShape
    from tunery.training.types import AdapterRun

_SITES = (
    # keys and values; the feed-forward's second matrix, whose input is the hidden activation
    (("k_proj", "v_proj"), ("down_proj", "fc2")),
    (("qkv_proj",), ("down_proj",)),
    (("key", "value"), ("output.dense",)),
    (("k_lin", "v_lin"), ("lin2",)),
    (("c_attn",), ("mlp.c_proj",)),
    (("query_key_value",), ("dense_4h_to_h",)),
)
"""The paper's places by the families' names for them; the first row with both is taken."""


class Ia3Config(EntryConfig):
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Linear modules whose output is scaled, or whose input if they are also "
        "feedforward_modules; null: keys, values and the feed-forward's second matrix.",
    )
    feedforward_modules: tuple[str, ...] = Field(
        (), description="Those of target_modules whose input is scaled instead of their output."
    )

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> Ia3Config:
        targets = self.target_modules or ()
        check_names(targets, "target_modules")
        extra = sorted(set(self.feedforward_modules) - set(targets))
        if extra:
            raise ValueError(f"feedforward_modules: {', '.join(extra)} not in target_modules")
        return self


class Ia3:
    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "(IA)³"
    summary: ClassVar[str] = "Scales keys, values and feed-forward activations by learned vectors."
    paper: ClassVar[str | None] = (
        "Liu et al.: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than "
        "In-Context Learning, 2022, arXiv 2205.05638"
    )
    Config: ClassVar[type[EntryConfig]] = Ia3Config
    example: ClassVar[Mapping[str, Any]] = {"type": "ia3"}
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = None
    default_learning_rate: ClassVar[float] = 3e-3
    mergeable: ClassVar[bool] = True
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: Ia3Config, shape: ModelShape) -> int:
        """Per layer: the out features of the scaled outputs, the in features of the inputs."""
        targets, feedforward = _sites(config, list(shape.linear_shapes))
        per_layer = sum(
            inputs if any(matches(name, site) for site in feedforward) else outputs
            for name, (inputs, outputs) in linears_of(shape, targets).items()
        )
        return shape.num_hidden_layers * per_layer + _peft.head_parameters(shape)

    def starts_as_base(self, config: Ia3Config) -> bool:
        """All vectors start at one."""
        return True

    def base_when_disabled(self, config: Ia3Config) -> bool:
        return True

    def apply(self, config: Ia3Config, run: AdapterRun) -> Any:
        """A `PeftModel` with (IA)3 layers.

        Raises:
            InvalidConfig: a target is not in the model, or its family's places are not known.
        """
        from peft import IA3Config

        targets, feedforward = _sites(config, [path for path, _ in run.model.named_modules()])
        return _peft.wrap(
            run,
            IA3Config(
                task_type=run.task_type,
                target_modules=targets_in(run.model, targets),
                feedforward_modules=targets_in(run.model, feedforward) if feedforward else [],
                modules_to_save=_peft.saved_modules(run),
                fan_in_fan_out=_peft.fan_in_fan_out(run.model),
            ),
        )


def _sites(config: Ia3Config, linears: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Targets, and those of them that are feed-forward, among the linears of a model or shape."""
    if config.target_modules is not None:
        return config.target_modules, config.feedforward_modules
    for attention, feedforward in _SITES:
        here = tuple(f for f in feedforward if any(matches(name, f) for name in linears))
        if here and all(any(matches(name, a) for name in linears) for a in attention):
            return (*attention, *here), here
    raise InvalidConfig(
        "target_modules: where keys, values and the feed-forward lie in this model is not known",
        hint="name them",
        param="target_modules",
    )


ENTRY: type[Adapter] = Ia3
