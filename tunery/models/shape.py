"""A base model's arithmetic from its `config.json`, without loading a tensor.

One row of `_FAMILIES` per family: how its linear modules are called and what they map between. The
names are suffixes of module paths, so that PEFT's rule (equal, or ends with "." + target) reads
them as it reads the model.
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

from tunery.entries import ModelShape
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format itself allows."""

Linears = dict[str, tuple[int, int]]


class _Sizes:
    """The numbers of a config under one name each, whatever the family calls them.

    Of models with an encoder and a decoder, both halves are taken to have the decoder's.
    """

    def __init__(self, config: dict[str, Any], *, reads: bool = True) -> None:
        self.hidden = _first(config, "hidden_size", "n_embd", "dim", "d_model")
        self.layers = _first(
            config, "decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers"
        )
        self.heads = _first(
            config,
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
        )
        self.intermediate = _first(
            config,
            "intermediate_size",
            "n_inner",
            "hidden_dim",
            "d_ff",
            "decoder_ffn_dim",
            default=4 * self.hidden,
        )
        self.kv_heads = _first(config, "num_key_value_heads", default=self.heads)
        self.head_dim = _first(config, "head_dim", "d_kv", default=self.hidden // self.heads)
        self.vocab = _first(config, "vocab_size", default=None if reads else 1)
        self.gated = str(config.get("feed_forward_proj", "")).startswith("gated")
        self.positions = _first(
            config, "max_position_embeddings", "n_positions", "n_ctx", default=2048
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


def _first(config: dict[str, Any], *names: str, default: int | None = None) -> int:
    """The first of `names` that the config gives a positive integer for."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is None:
        raise InvalidConfig(
            f"config.json gives no {' or '.join(names)}",
            code="unsupported_architecture",
            hint="the folder is not a language model that Tunery knows",
        )
    return default


def _attention(s: _Sizes) -> Linears:
    return {
        "q_proj": (s.hidden, s.queries),
        "k_proj": (s.hidden, s.keys),
        "v_proj": (s.hidden, s.keys),
    }


def _gated(s: _Sizes) -> Linears:
    """Llama and those after it."""
    return {
        **_attention(s),
        "o_proj": (s.queries, s.hidden),
        "gate_proj": (s.hidden, s.intermediate),
        "up_proj": (s.hidden, s.intermediate),
        "down_proj": (s.intermediate, s.hidden),
    }


def _phi(s: _Sizes) -> Linears:
    return {
        **_attention(s),
        "dense": (s.queries, s.hidden),
        "fc1": (s.hidden, s.intermediate),
        "fc2": (s.intermediate, s.hidden),
    }


def _phi3(s: _Sizes) -> Linears:
    return {
        "qkv_proj": (s.hidden, s.queries + 2 * s.keys),
        "o_proj": (s.queries, s.hidden),
        "gate_up_proj": (s.hidden, 2 * s.intermediate),
        "down_proj": (s.intermediate, s.hidden),
    }


def _bert(s: _Sizes) -> Linears:
    return {
        "query": (s.hidden, s.hidden),
        "key": (s.hidden, s.hidden),
        "value": (s.hidden, s.hidden),
        "attention.output.dense": (s.hidden, s.hidden),
        "intermediate.dense": (s.hidden, s.intermediate),
        "output.dense": (s.intermediate, s.hidden),
    }


def _distilbert(s: _Sizes) -> Linears:
    return {
        **{name: (s.hidden, s.hidden) for name in ("q_lin", "k_lin", "v_lin", "out_lin")},
        "lin1": (s.hidden, s.intermediate),
        "lin2": (s.intermediate, s.hidden),
    }


def _gpt2(s: _Sizes) -> Linears:
    return {
        "c_attn": (s.hidden, 3 * s.hidden),
        "attn.c_proj": (s.hidden, s.hidden),
        "c_fc": (s.hidden, s.intermediate),
        "mlp.c_proj": (s.intermediate, s.hidden),
    }


def _neox(s: _Sizes) -> Linears:
    return {
        "query_key_value": (s.hidden, 3 * s.hidden),
        "attention.dense": (s.hidden, s.hidden),
        "dense_h_to_4h": (s.hidden, s.intermediate),
        "dense_4h_to_h": (s.intermediate, s.hidden),
    }


def _mpnet(s: _Sizes) -> Linears:
    return {
        **{f"attn.{name}": (s.hidden, s.hidden) for name in "qkvo"},
        "intermediate.dense": (s.hidden, s.intermediate),
        "output.dense": (s.intermediate, s.hidden),
    }


def _deberta(s: _Sizes) -> Linears:
    return {
        **{f"{name}_proj": (s.hidden, s.hidden) for name in ("query", "key", "value")},
        "attention.output.dense": (s.hidden, s.hidden),
        "intermediate.dense": (s.hidden, s.intermediate),
        "output.dense": (s.intermediate, s.hidden),
    }


def _modernbert(s: _Sizes) -> Linears:
    return {
        "Wqkv": (s.hidden, 3 * s.hidden),
        "attn.Wo": (s.hidden, s.hidden),
        "Wi": (s.hidden, 2 * s.intermediate),
        "mlp.Wo": (s.intermediate, s.hidden),
    }


def _vit(s: _Sizes) -> Linears:
    """Those that see, and the one that sees sounds."""
    return {
        **{f"{name}_proj": (s.hidden, s.hidden) for name in "qkvo"},
        "fc1": (s.hidden, s.intermediate),
        "fc2": (s.intermediate, s.hidden),
    }


def _wav2vec2(s: _Sizes) -> Linears:
    return {
        **{f"{name}_proj": (s.hidden, s.hidden) for name in ("q", "k", "v", "out")},
        "intermediate_dense": (s.hidden, s.intermediate),
        "output_dense": (s.intermediate, s.hidden),
    }


def _t5(s: _Sizes) -> Linears:
    """Named by half, since both have modules of one name."""
    inside = {
        **{name: (s.hidden, s.queries) for name in "qkv"},
        "o": (s.queries, s.hidden),
    }
    rising = ("wi_0", "wi_1") if s.gated else ("wi",)
    forward = {
        **{f"DenseReluDense.{name}": (s.hidden, s.intermediate) for name in rising},
        "DenseReluDense.wo": (s.intermediate, s.hidden),
    }
    half = {**{f"SelfAttention.{name}": sizes for name, sizes in inside.items()}, **forward}
    across = {f"EncDecAttention.{name}": sizes for name, sizes in inside.items()}
    return _halves(half, across)


def _bart(s: _Sizes) -> Linears:
    """Named by half, since both have modules of one name."""
    inside = {f"{name}_proj": (s.hidden, s.hidden) for name in ("q", "k", "v", "out")}
    forward = {"fc1": (s.hidden, s.intermediate), "fc2": (s.intermediate, s.hidden)}
    half = {**{f"self_attn.{name}": sizes for name, sizes in inside.items()}, **forward}
    across = {f"encoder_attn.{name}": sizes for name, sizes in inside.items()}
    return _halves(half, across)


def _halves(half: Linears, across: Linears) -> Linears:
    return {
        **{f"encoder.{name}": sizes for name, sizes in half.items()},
        **{f"decoder.{name}": sizes for name, sizes in (half | across).items()},
    }


# A family's linear modules, and whether its configs tie the head to the embedding when they do not
# say so. The default is the class default of each family in transformers.
_FAMILIES: dict[str, tuple[Callable[[_Sizes], Linears], bool]] = {
    "llama": (_gated, False),
    "mistral": (_gated, False),
    "qwen2": (_gated, False),
    "qwen3": (_gated, False),
    "smollm3": (_gated, True),
    "gemma": (_gated, True),
    "gemma2": (_gated, True),
    "gemma3_text": (_gated, True),
    "phi": (_phi, False),
    "phi3": (_phi3, False),
    "gpt2": (_gpt2, True),
    "gpt_neox": (_neox, False),
    "bert": (_bert, True),
    "roberta": (_bert, True),
    "xlm-roberta": (_bert, True),
    "electra": (_bert, True),
    "distilbert": (_distilbert, True),
    "mpnet": (_mpnet, True),
    "deberta-v2": (_deberta, True),
    "modernbert": (_modernbert, True),
    "t5": (_t5, True),
    "mt5": (_t5, True),
    "bart": (_bart, True),
    "whisper": (_bart, True),
    "vit": (_vit, True),
    "audio-spectrogram-transformer": (_vit, True),
    "wav2vec2": (_wav2vec2, True),
    "hubert": (_wav2vec2, True),
}
_WITHOUT_WORDS = frozenset({"vit", "audio-spectrogram-transformer", "wav2vec2", "hubert"})
"""Families that see or hear and have no vocabulary to speak of."""


def shape_of(config: dict[str, Any], parameters: int = 0) -> ModelShape:
    """The shape that a parsed `config.json` describes.

    Raises:
        InvalidConfig: the family is not known, or the config lacks a size.
    """
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise InvalidConfig(
            f"model_type {kind!r} is not supported",
            code="unsupported_architecture",
            hint=f"supported: {', '.join(sorted(_FAMILIES))}",
        )
    linears, tied = _FAMILIES[kind]
    sizes = _Sizes(config, reads=kind not in _WITHOUT_WORDS)
    architectures = config.get("architectures") or [kind]
    labels = config.get("id2label")
    return ModelShape(
        architecture=architectures[0],
        model_type=kind,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", tied)),
        linear_shapes=linears(sizes),
        parameters=parameters,
        num_labels=len(labels) if labels else None,
    )


def shape(path: Path) -> ModelShape:
    """The shape of the model in a folder; `parameters` is 0 where there are no safetensors.

    Raises:
        InvalidConfig: no readable `config.json`, a family that is not known, or a broken file.
    """
    return shape_of(read_json(path / "config.json"), count_parameters(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InvalidConfig: it is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{path.name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidConfig(f"{path.name} is not a JSON object")
    return value


def count_parameters(folder: Path) -> int:
    """Scalars in all safetensors files of a folder, from their headers; a tied head counts once."""
    numbers = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in tensor_headers(file).items():
            numbers[name] = math.prod(entry["shape"])
    return sum(numbers.values())


def tensor_headers(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: name to `{dtype, shape, data_offsets}`.

    Raises:
        InvalidConfig: it is not a safetensors file, or an offset lies outside it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InvalidConfig(f"{file.name} is not a safetensors file", code="unsafe_file")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise InvalidConfig(f"{file.name}: the header is not JSON", code="unsafe_file") from error
    return _checked_header(file.name, header, size - 8 - length)


def _checked_header(name: str, header: Any, data_bytes: int) -> dict[str, dict[str, Any]]:
    if not isinstance(header, dict):
        raise InvalidConfig(f"{name}: the header is not an object", code="unsafe_file")
    header.pop("__metadata__", None)
    for tensor, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        shaped = isinstance(entry, dict) and isinstance(entry.get("shape"), list)
        if not shaped or not isinstance(offsets, list) or len(offsets) != 2:
            raise InvalidConfig(f"{name}: tensor {tensor[:80]!r} is malformed", code="unsafe_file")
        if not 0 <= offsets[0] <= offsets[1] <= data_bytes:
            raise InvalidConfig(
                f"{name}: tensor {tensor[:80]!r} lies outside the file", code="unsafe_file"
            )
    return header
