"""BitFit and LayerNorm tuning: their counts in every family, and what stays."""

from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from tunery.adapters.bitfit import Bitfit, BitfitConfig
from tunery.adapters.ln_tuning import LnTuning, LnTuningConfig
from tunery.adapters.p_tuning import PTuning, PTuningConfig
from tunery.errors import InvalidConfig
from tunery.models.shape import shape_of
from tunery.training.types import AdapterRun

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
KEYS = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, **KEYS},
    "qwen2": {**SIZES, "num_key_value_heads": 2},
    "qwen3": {**SIZES, **KEYS},
    "gemma2": {**SIZES, **KEYS},
    "phi": SIZES,
    "phi3": {**SIZES, "num_key_value_heads": 2},
    "gpt_neox": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64},
    "bert": SIZES,
    "roberta": SIZES,
    "electra": {**SIZES, "embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 64},
}
ENCODERS = ("bert", "roberta", "electra", "distilbert")


def built(family: str, *, labels: int | None = None) -> tuple[Any, Any]:
    """A tiny model and its shape."""
    more = {"num_labels": labels} if labels else {}
    config = AutoConfig.for_model(family, **FAMILIES[family], **more)
    auto: Any = AutoModel if family in ENCODERS else AutoModelForCausalLM
    model = (AutoModelForSequenceClassification if labels else auto).from_config(config)
    shape = shape_of(config.to_dict()).model_copy(update={"num_labels": labels})
    return model, shape


def applied(entry: Any, config: Any, model: Any, *, labels: int | None = None) -> Any:
    task = "SEQ_CLS" if labels else "FEATURE_EXTRACTION"
    return entry.apply(config, AdapterRun(model, task, None, 7, "example/base"))  # type: ignore[arg-type]


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_counted_in_every_family(family: str) -> None:
    model, shape = built(family)
    tuned = applied(LnTuning(), LnTuningConfig(), model)
    assert trainable(tuned) == LnTuning().trainable_parameters(LnTuningConfig(), shape)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in ("llama", "qwen3", "gemma2", "phi3")]
)
def test_biases_are_counted_in_every_family_that_has_them(family: str) -> None:
    model, shape = built(family)
    tuned = applied(Bitfit(), BitfitConfig(), model)
    names = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trainable(tuned) == Bitfit().trainable_parameters(BitfitConfig(), shape)
    assert all(name.endswith(".bias") for name in names)
    assert not any("pooler" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_head_trains_whole_beside_biases(family: str) -> None:
    model, shape = built(family, labels=3)
    tuned = applied(Bitfit(), BitfitConfig(), model, labels=3)
    assert trainable(tuned) == Bitfit().trainable_parameters(BitfitConfig(), shape)


def test_counts_by_hand() -> None:
    _, bert = built("bert")
    # A layer's biases: four of 32 in attention, 48 and 32 after it, two norms of 32.
    assert Bitfit().trainable_parameters(BitfitConfig(), bert) == 3 * (128 + 80 + 64) + 32
    _, qwen = built("qwen2")
    assert Bitfit().trainable_parameters(BitfitConfig(), qwen) == 3 * (32 + 16 + 16)
    _, llama = built("llama")
    assert LnTuning().trainable_parameters(LnTuningConfig(), llama) == (3 * 2 + 1) * 32
    prompt = PTuningConfig(num_virtual_tokens=5, encoder_hidden_size=7)
    expected = 5 * 32 + (32 * 7 + 7) + (7 * 7 + 7) + (7 * 32 + 32)
    assert PTuning().trainable_parameters(prompt, llama) == expected


def test_what_cannot_be_meant_is_refused() -> None:
    unknown = built("llama")[1].model_copy(update={"model_type": "unheard-of"})
    with pytest.raises(InvalidConfig, match="'unheard-of' are not known"):
        LnTuning().trainable_parameters(LnTuningConfig(), unknown)
    with pytest.raises(ValueError, match="belong to the LSTM"):
        PTuningConfig(encoder_dropout=0.1)
