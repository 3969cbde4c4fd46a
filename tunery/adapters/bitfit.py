"""BitFit: only the biases train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunery.adapters import _peft
from tunery.adapters._norms import norms_by_type, norms_of
from tunery.adapters._targets import (
    ALL_LINEAR,
    has_bias,
    in_block,
    linears_of,
    matches,
    sizes_in,
    targets_in,
)
from tunery.entries import EntryConfig
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import Adapter, ModelShape
    from tunery.training.types import AdapterRun


class BitfitConfig(EntryConfig):
    """Nothing to choose."""


class Bitfit:
    """Biases of the blocks and of the norms around them; those of poolers and LM heads stay.

    Saved as what PEFT has for trained biases: a LoRA configuration with bias "all". The LoRA that
    must be there is of rank 1 on a single module, frozen, and zero.
    """

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    summary: ClassVar[str] = "Trains the biases alone, in models that have them."
    paper: ClassVar[str | None] = (
        "Ben Zaken, Ravfogel, Goldberg: BitFit: Simple Parameter-efficient Fine-tuning for "
        "Transformer-based Masked Language-models, 2021, arXiv 2106.10199"
    )
    Config: ClassVar[type[EntryConfig]] = BitfitConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "bitfit"}
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.UNDIVIDED
    default_learning_rate: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: BitfitConfig, shape: ModelShape) -> int:
        """The outputs of the blocks' linears with bias, and the hidden size for each norm's.

        Raises:
            InvalidConfig: the family has no biases.
        """
        linears = sum(
            outputs
            for name, (_, outputs) in linears_of(shape, ALL_LINEAR).items()
            if has_bias(shape, name)
        )
        norms = norms_of(shape)
        vectors = norms.count(shape.num_hidden_layers) if norms.bias else 0
        total = shape.num_hidden_layers * linears + vectors * shape.hidden_size
        if not total:
            raise _no_biases(shape.model_type)
        return total + _peft.head_parameters(shape)

    def starts_as_base(self, config: BitfitConfig) -> bool:
        return True

    def base_when_disabled(self, config: BitfitConfig) -> bool:
        """The base's own biases train."""
        return False

    def apply(self, config: BitfitConfig, run: AdapterRun) -> Any:
        """A `PeftModel` in which only biases train.

        Raises:
            InvalidConfig: the model has none, or its family's norms are not known.
        """
        from peft import LoraConfig

        biases = _biases(run.model)
        placeholder = sizes_in(run.model, targets_in(run.model, ALL_LINEAR))[0][0]
        model = _peft.wrap(
            run,
            LoraConfig(
                task_type=run.task_type,
                r=1,
                bias="all",
                target_modules=[placeholder],
                modules_to_save=_peft.saved_modules(run),
                fan_in_fan_out=_peft.fan_in_fan_out(run.model),
            ),
        )
        for name, parameter in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter.requires_grad_(plain in biases or ".modules_to_save." in name)
        return model


def _biases(model: Any) -> set[str]:
    """Names of the biases that train.

    Raises:
        InvalidConfig: there are none.
    """
    kind = model.config.model_type
    outside = norms_by_type(kind).outside
    found = {
        name
        for name, _ in model.named_parameters()
        if name.endswith(".bias")
        and (in_block(name) or any(matches(name.removesuffix(".bias"), norm) for norm in outside))
    }
    if not found:
        raise _no_biases(kind)
    return found


def _no_biases(model_type: str) -> InvalidConfig:
    return InvalidConfig(
        f"models of the family {model_type!r} have no biases to train",
        hint="ln_tuning, ia3 and lora train few parameters of any model",
        code="unsupported_architecture",
        param="type",
    )


ENTRY: type[Adapter] = Bitfit
