"""What the adapters on PEFT share: seeded wrapping, heads, and what a head weighs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunery.errors import InvalidConfig, UnsupportedCombination

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from tunery.entries import ModelShape
    from tunery.training.types import AdapterRun

HEADS = (
    "score",
    "classifier",
    "pre_classifier",
    "classification_head",
    "qa_outputs",
    "projector",
)
"""How transformers calls the modules that a task's model adds to its base."""

_DENSE_HEADS = frozenset({"roberta", "xlm-roberta", "electra", "distilbert"})
"""Families whose head is a square layer with bias and then the classifier."""
_PLAIN_HEADS = frozenset({"bert"}) | _DENSE_HEADS
"""Families whose classifier has a bias; a decoder's `score` has none."""

_EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out"}
)
"""Modules of vocabulary times hidden size that may be trained in full beside the adapter."""

UNDIVIDED = frozenset({"single", "ddp", "deepspeed_zero0", "deepspeed_zero1", "deepspeed_zero2"})
"""Strategies under which a soft prompt or prefix, which belongs to no module, stays whole."""

BY_BLOCK = UNDIVIDED | {"fsdp"}
"""Strategies under which a block's weights are whole while the block runs."""


def head_parameters(shape: ModelShape) -> int:
    """Scalars of the classification head, which always trains; 0 where there is none."""
    if shape.num_labels is None:
        return 0
    hidden, labels = shape.hidden_size, shape.num_labels
    dense = hidden * hidden + hidden if shape.model_type in _DENSE_HEADS else 0
    bias = labels if shape.model_type in _PLAIN_HEADS else 0
    return dense + hidden * labels + bias


def saved_parameters(shape: ModelShape, modules_to_save: Sequence[str]) -> int:
    """Scalars of the embeddings and heads trained in full beside the adapter.

    Raises:
        InvalidConfig: another module is named, whose size `config.json` does not tell.
    """
    for name in modules_to_save:
        if name not in _EMBEDDINGS:
            raise InvalidConfig(
                f"modules_to_save: {name!r} is neither an embedding nor a head",
                hint=f"possible: {', '.join(sorted(_EMBEDDINGS))}; a classification head is "
                "always trained",
                param="modules_to_save",
            )
    bias = shape.vocab_size if shape.model_type == "phi" and "lm_head" in modules_to_save else 0
    return len(set(modules_to_save)) * shape.vocab_size * shape.hidden_size + bias


def heads_of(model: nn.Module) -> list[str]:
    """Names of the modules that the model's task added to the base: trained and saved whole."""
    return [name for name, _ in model.named_children() if name in HEADS]


def saved_modules(run: AdapterRun, asked: Sequence[str] = ()) -> list[str] | None:
    """PEFT's `modules_to_save`: what was asked for and the head of the model's task.

    Raises:
        InvalidConfig: the model has no module of that name.
    """
    names = {path.rpartition(".")[2] for path, _ in run.model.named_modules()}
    for name in asked:
        if name not in names:
            raise InvalidConfig(
                f"modules_to_save: the model has no module {name!r}", param="modules_to_save"
            )
    head = heads_of(run.model)
    return [*asked, *(name for name in head if name not in asked)] or None


@contextmanager
def seeded(run: AdapterRun) -> Iterator[None]:
    """Draws inside depend on `run.seed` alone and leave the generators outside as they were."""
    import torch

    device = run.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(run.seed)
        yield


def wrap(run: AdapterRun, config: Any) -> Any:
    """The `PeftModel` around `run.model`, initialised from the seed.

    The saved configuration names the base as the run does, never a folder of this machine.

    Raises:
        UnsupportedCombination: a soft prompt, for a model that reads no text.
    """
    from peft import get_peft_model

    if config.is_prompt_learning and run.task_type is None:
        raise UnsupportedCombination(
            "a soft prompt stands in front of a text's tokens, and this task's model reads none",
            hint="lora, ia3 and other adapters of its modules train it",
        )
    with seeded(run):
        model = get_peft_model(run.model, config)
    ours = model.peft_config["default"]
    ours.base_model_name_or_path = run.base_model_name
    ours.revision = run.revision
    return model


def fan_in_fan_out(model: nn.Module) -> bool:
    """Whether the model's linears are GPT-2's `Conv1D`, stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())
