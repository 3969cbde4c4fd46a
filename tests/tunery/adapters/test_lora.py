"""LoRA's own rules: which modules, how many parameters, what is refused."""

import pytest
import torch
from peft import get_peft_model_state_dict
from pydantic import ValidationError
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tunery.adapters.lora import Lora, LoraConfig
from tunery.errors import InvalidConfig
from tunery.models.shape import shape_of
from tunery.training.types import AdapterRun

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
BERT = BertConfig(**SIZES, num_attention_heads=4)
GPT2 = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64)


def shape(config):
    return shape_of(config.to_dict()).model_copy(update={"num_labels": None})


def build(model, seed=0, task="CAUSAL_LM", **config):
    run = AdapterRun(model, task, None, seed, "example/base")
    return Lora().apply(LoraConfig(**config), run)


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameters_by_hand() -> None:
    # q 32->32, k and v 32->16, o 32->32, gate and up 32->48, down 48->32: in + out summed is 464.
    assert Lora().trainable_parameters(LoraConfig(r=2), shape(LLAMA)) == 3 * 2 * 464
    only_q = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2])
    assert Lora().trainable_parameters(only_q, shape(LLAMA)) == 2 * 2 * 64


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 8}},
        {"rank_pattern": {"layers.1.mlp.down_proj": 7, "self_attn.q_proj": 1}},
        {"target_modules": ["mlp.up_proj"], "alpha_pattern": {"up_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [2], "use_dora": True},
    ],
)
def test_the_formula_counts_what_a_llama_trains(config) -> None:
    model = build(LlamaForCausalLM(LLAMA), r=4, **config)
    assert trainable(model) == Lora().trainable_parameters(LoraConfig(r=4, **config), shape(LLAMA))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["dense"]},
        {"target_modules": ["output.dense"]},
        {"target_modules": ["attention.output.dense", "query"], "bias": "lora_only"},
    ],
)
def test_the_formula_counts_what_an_encoder_trains_and_the_pooler_stays(config) -> None:
    model = build(BertModel(BERT), task="FEATURE_EXTRACTION", r=4, **config)
    assert trainable(model) == Lora().trainable_parameters(LoraConfig(r=4, **config), shape(BERT))
    assert not any("pooler" in name for name, p in model.named_parameters() if p.requires_grad)


def test_transposed_linears_of_gpt2_are_counted_too() -> None:
    model = build(GPT2LMHeadModel(GPT2), r=4)
    assert trainable(model) == Lora().trainable_parameters(LoraConfig(r=4), shape(GPT2))


def test_target_names_are_short_where_that_is_unambiguous() -> None:
    model = build(LlamaForCausalLM(LLAMA))
    assert set(model.peft_config["default"].target_modules) == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_another_seed_is_another_start() -> None:
    first, second = (
        get_peft_model_state_dict(
            build(LlamaForCausalLM(LLAMA), seed=seed), save_embedding_layers=False
        )
        for seed in (1, 2)
    )
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if "lora_B" in name}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "greater than or equal to 1"),
        ({"target_modules": []}, "at least 1 item"),
        ({"target_modules": [".*proj"]}, "is not a module's name"),
        ({"rank_pattern": {"q_proj": 0}}, "1 to 1024"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "even ranks"),
        ({"init_lora_weights": "eva"}, "gaussian"),
        ({"init_lora_weights": False}, "gaussian"),
        ({"layers_to_transform": [-1]}, "count from 0"),
        ({"lora_r": 4}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config, message) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraConfig(**config)


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"target_modules": ["q_porj"]}, "no linear module 'q_porj'", "did you mean 'q_proj'"),
        ({"layers_to_transform": [3]}, "3 is past the last layer, 2", None),
        ({"modules_to_save": ["norm"]}, "neither an embedding nor a head", "lm_head"),
    ],
)
def test_what_the_model_does_not_have_is_refused_from_its_shape(config, message, hint) -> None:
    with pytest.raises(InvalidConfig, match=message) as caught:
        Lora().trainable_parameters(LoraConfig(**config), shape(LLAMA))
    assert hint is None or hint in (caught.value.hint or "")
    assert caught.value.param == next(iter(config))


def test_what_the_model_does_not_have_is_refused_by_the_model() -> None:
    with pytest.raises(InvalidConfig, match="no linear module"):
        build(LlamaForCausalLM(LLAMA), target_modules=["query"])
    with pytest.raises(InvalidConfig, match="no module 'wte'"):
        build(LlamaForCausalLM(LLAMA), modules_to_save=["wte"])
