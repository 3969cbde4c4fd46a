"""How the families call their normalisation layers, and which of these add a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from tunery.entries import ModelShape


@dataclass(frozen=True, slots=True)
class Norms:
    """Those as wide as the hidden states.

    Attributes:
        inside: of each block, by the end of their path.
        outside: before or after the blocks.
        bias: whether they add one.
    """

    inside: tuple[str, ...]
    outside: tuple[str, ...]
    bias: bool

    def count(self, layers: int) -> int:
        """In a model of so many blocks."""
        return layers * len(self.inside) + len(self.outside)


_LLAMA = Norms(("input_layernorm", "post_attention_layernorm"), ("norm",), bias=False)
_GEMMA = Norms(
    (*_LLAMA.inside, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("norm",),
    bias=False,
)
_BERT = Norms(
    ("attention.output.LayerNorm", "output.LayerNorm"), ("embeddings.LayerNorm",), bias=True
)

_FAMILIES: dict[str, Norms] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
    # Its embeddings may be narrower than its hidden states.
    "electra": Norms(_BERT.inside, (), bias=True),
    "distilbert": Norms(
        ("sa_layer_norm", "output_layer_norm"), ("embeddings.LayerNorm",), bias=True
    ),
    "gpt2": Norms(("ln_1", "ln_2"), ("ln_f",), bias=True),
    "gpt_neox": Norms(
        ("input_layernorm", "post_attention_layernorm"), ("final_layer_norm",), bias=True
    ),
    "phi": Norms(("input_layernorm",), ("final_layernorm",), bias=True),
}


def norms_of(shape: ModelShape) -> Norms:
    """The family's normalisation layers.

    Raises:
        InvalidConfig: a family whose layers are not known.
    """
    return norms_by_type(shape.model_type)


def norms_by_type(model_type: str) -> Norms:
    """The normalisation layers of the family with this `model_type`.

    Raises:
        InvalidConfig: a family whose layers are not known.
    """
    if model_type not in _FAMILIES:
        raise InvalidConfig(
            f"the normalisation layers of {model_type!r} are not known",
            hint=f"known: {', '.join(sorted(_FAMILIES))}",
            code="unsupported_architecture",
            param="type",
        )
    return _FAMILIES[model_type]
