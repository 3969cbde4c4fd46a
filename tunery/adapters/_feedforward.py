"""Where the families' feed-forward sub-layers begin and end, and where their attention is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tunery.adapters._targets import paths_by_tail
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from torch import nn


class FeedForward(NamedTuple):
    """Paths inside a block: a linear that reads the sub-layer's input, and its last linear."""

    first: str
    last: str


_GATED = FeedForward("mlp.gate_proj", "mlp.down_proj")
_BERT = FeedForward("intermediate.dense", "output.dense")
_FAMILIES: dict[str, FeedForward] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "smollm3",
            "gemma",
            "gemma2",
            "gemma3_text",
        ),
        _GATED,
    ),
    "phi": FeedForward("mlp.fc1", "mlp.fc2"),
    "phi3": FeedForward("mlp.gate_up_proj", "mlp.down_proj"),
    "gpt2": FeedForward("mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": FeedForward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    "distilbert": FeedForward("ffn.lin1", "ffn.lin2"),
}


_ATTENTION: dict[str, str] = {
    **dict.fromkeys(_FAMILIES, "self_attn.k_proj"),
    "phi3": "self_attn.qkv_proj",
    "gpt2": "attn.c_attn",
    "gpt_neox": "attention.query_key_value",
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), "attention.self.key"),
    "distilbert": "attention.k_lin",
}
"""Path inside a block of a linear module whose parent is the attention: the one to keys."""


def attention_linear(model_type: str) -> str:
    """The linear module that makes the family's keys.

    Raises:
        InvalidConfig: a family whose attention is not known.
    """
    if model_type not in _ATTENTION:
        raise _unknown("attention", model_type)
    return _ATTENTION[model_type]


def feedforward_of(model_type: str) -> FeedForward:
    """The family's feed-forward sub-layer.

    Raises:
        InvalidConfig: a family whose places are not known.
    """
    if model_type not in _FAMILIES:
        raise _unknown("feed-forward", model_type)
    return _FAMILIES[model_type]


def last_linears(model: nn.Module, model_type: str) -> list[str]:
    """Targets for PEFT that pick the last linear of each block's feed-forward and nothing else."""
    return paths_by_tail(model, feedforward_of(model_type).last)


def _unknown(what: str, model_type: str) -> InvalidConfig:
    return InvalidConfig(
        f"where the {what} of {model_type!r} lies is not known",
        hint=f"known: {', '.join(sorted(_FAMILIES))}",
        code="unsupported_architecture",
        param="type",
    )
