from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from tunery.errors import InvalidConfig
from tunery.models import shape, shape_of

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 16},
    "smollm3": {**SMALL, "pad_token_id": 0},
    "gemma": {**SMALL, "head_dim": 16},
    "gemma2": {**SMALL, "head_dim": 16},
    "gemma3_text": {**SMALL, "head_dim": 16},
    "phi": SMALL,
    "phi3": {**SMALL, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 128},
    "gpt_neox": SMALL,
    "bert": SMALL,
    "roberta": SMALL,
    "xlm-roberta": SMALL,
    "electra": {**SMALL, "embedding_size": 32},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
    "mpnet": SMALL,
    "deberta-v2": SMALL,
    "modernbert": {**SMALL, "pad_token_id": 0},
}
_SEEING = {key: SMALL[key] for key in list(SMALL)[:4]}
SEEING = {
    "vit": _SEEING,
    "audio-spectrogram-transformer": _SEEING,
    "wav2vec2": _SEEING,
    "hubert": _SEEING,
}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
_BART = {
    "d_model": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 48 for half in ("encoder", "decoder")},
}
HALVES = {
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "bart": _BART,
    "whisper": _BART,
}


@pytest.mark.parametrize("family", HALVES)
def test_both_halves_have_the_linear_modules_that_transformers_builds(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family, **HALVES[family])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    built = {}
    for name, module in model.named_modules():
        half, layer, inside = name.partition(".layers.0.")
        if not layer:
            half, layer, inside = name.partition(".block.0.")
            inside = inside.partition(".")[2].partition(".")[2]  # after layer.1.
        if layer and isinstance(module, torch.nn.Linear):
            built[f"{half}.{inside}"] = (module.in_features, module.out_features)
    found = shape_of(config.to_dict())
    assert built == found.linear_shapes
    assert found.num_hidden_layers == 2


@pytest.mark.parametrize("family", sorted(FAMILIES | SEEING))
def test_linear_modules_are_those_that_transformers_builds(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.for_model(family, **(FAMILIES | SEEING)[family])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    built: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if ".0." not in name or not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        rows, columns = module.weight.shape
        built[name] = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
    found = shape_of(config.to_dict())
    # Longest suffix first: "attention.output.dense" also ends with "output.dense".
    named = {}
    for path, sizes in built.items():
        fits = [s for s in found.linear_shapes if path == s or path.endswith("." + s)]
        named[max(fits, key=len)] = sizes
    assert named == found.linear_shapes
    assert found.num_hidden_layers == 2
    assert found.vocab_size == 64 or family in SEEING


def test_tied_embeddings_default_as_in_transformers() -> None:
    from transformers import AutoConfig

    for family, sizes in FAMILIES.items():
        config = AutoConfig.for_model(family, **sizes)
        written = json.loads(config.to_json_string(use_diff=True)) | {"model_type": family} | sizes
        if "tie_word_embeddings" in written:
            continue
        assert shape_of(written).tie_word_embeddings == config.tie_word_embeddings, family


def _safetensors(path: Path, header: Any, data: bytes = b"") -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _tensor(*size: int, offsets: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(size), "data_offsets": list(offsets)}


def test_parameters_are_counted_over_all_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    _safetensors(tmp_path / "a.safetensors", {"x": _tensor(3, 5), "__metadata__": {"format": "pt"}})
    _safetensors(tmp_path / "b.safetensors", {"y": _tensor(7)})
    assert shape(tmp_path).parameters == 22


@pytest.mark.parametrize(
    "header",
    [{"x": _tensor(4, offsets=(0, 16))}, {"x": _tensor(4, offsets=(8, 4))}, {"x": 3}, []],
)
def test_a_tensor_outside_its_file_is_refused(tmp_path: Path, header: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    _safetensors(tmp_path / "model.safetensors", header)
    with pytest.raises(InvalidConfig) as caught:
        shape(tmp_path)
    assert caught.value.code == "unsafe_file"


def test_a_zip_called_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    with pytest.raises(InvalidConfig):
        shape(tmp_path)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig) as caught:
        shape_of({"model_type": "telegraph"})
    assert "llama" in (caught.value.hint or "")
