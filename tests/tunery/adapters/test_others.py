"""(IA)3, prompt and prefix: counts by hand, starts, refusals."""

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tunery.adapters.ia3 import Ia3, Ia3Config
from tunery.adapters.prefix import Prefix, PrefixConfig
from tunery.adapters.prompt import Prompt, PromptConfig
from tunery.errors import InvalidConfig, UnsupportedCombination
from tunery.models.shape import shape_of
from tunery.request import parse_request
from tunery.resolve import resolve
from tunery.spec import DataFile
from tunery.training.types import AdapterRun

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)


class WordTokenizer:
    """Words are numbers, and their own ids."""

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": [int(word) for word in text.split()]}


def shape(config):
    return shape_of(config.to_dict()).model_copy(update={"num_labels": None})


def run_on(model, task="CAUSAL_LM", seed=0):
    return AdapterRun(model, task, WordTokenizer(), seed, "example/base")


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_counts_by_hand() -> None:
    llama = shape(LLAMA)
    assert Ia3().trainable_parameters(Ia3Config(), llama) == 3 * (16 + 16 + 48)
    assert Prompt().trainable_parameters(PromptConfig(num_virtual_tokens=5), llama) == 5 * 32
    prefix = PrefixConfig(num_virtual_tokens=5)
    assert Prefix().trainable_parameters(prefix, llama) == 5 * 2 * 3 * 16
    projected = PrefixConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7)
    expected = 5 * 16 + (16 * 7 + 7) + (7 * 96 + 96)
    assert Prefix().trainable_parameters(projected, llama) == expected


@pytest.mark.parametrize(
    "model",
    [
        BertModel(BertConfig(**SIZES, num_attention_heads=4)),
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64)),
        DistilBertModel(DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_ia3_finds_its_places_in_other_families(model) -> None:
    expected = Ia3().trainable_parameters(Ia3Config(), shape(model.config))
    assert trainable(Ia3().apply(Ia3Config(), run_on(model, "FEATURE_EXTRACTION"))) == expected


def test_ia3_says_when_it_does_not_know_the_places() -> None:
    unknown = shape(LLAMA).model_copy(update={"linear_shapes": {"fc": (4, 4)}})
    with pytest.raises(InvalidConfig, match="is not known"):
        Ia3().trainable_parameters(Ia3Config(), unknown)
    assert Ia3().trainable_parameters(Ia3Config(target_modules=["fc"]), unknown) == 12


def test_a_prompt_can_start_from_words_repeated_to_its_length() -> None:
    base = LlamaForCausalLM(LLAMA)
    table = base.get_input_embeddings().weight.detach().clone()
    config = PromptConfig(num_virtual_tokens=5, init="text", init_text="7 9")
    model = Prompt().apply(config, run_on(base))
    learned = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(learned, table[[7, 9, 7, 9, 7]])


def test_a_prompt_from_the_vocabulary_is_made_of_its_rows_and_follows_the_seed() -> None:
    def rows(seed):
        base = LlamaForCausalLM(LLAMA)
        table = base.get_input_embeddings().weight
        model = Prompt().apply(PromptConfig(), run_on(base, seed=seed))
        learned = model.prompt_encoder["default"].embedding.weight
        return [int((table == row).all(1).nonzero()) for row in learned]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_a_text_without_tokens_is_refused() -> None:
    config = PromptConfig(init="text", init_text=" ")
    with pytest.raises(InvalidConfig, match="no tokens"):
        Prompt().apply(config, run_on(LlamaForCausalLM(LLAMA)))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (PromptConfig, {"init": "text"}, "needs it"),
        (PromptConfig, {"init_text": "x"}, "belongs to init 'text'"),
        (PromptConfig, {"num_virtual_tokens": 0}, "greater than or equal to 1"),
        (PrefixConfig, {"encoder_hidden_size": 8}, "needs prefix_projection"),
        (Ia3Config, {"feedforward_modules": ["fc2"]}, "not in target_modules"),
        (Ia3Config, {"target_modules": ["a|b"]}, "is not a module's name"),
    ],
)
def test_contradictions_are_refused(config, settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**settings)


def test_a_prefix_and_recomputed_activations_are_refused_together() -> None:
    body = {
        "model": "org/base",
        "training_file": "file-1",
        "method": {"type": "supervised", "supervised": {"adapter": {"type": "prefix"}}},
        "ext": {"compute": {"gradient_checkpointing": True}},
    }
    file = DataFile(file_id="file-1", sha256="0" * 64, format="chat", rows=20, size_bytes=900)
    with pytest.raises(UnsupportedCombination, match="recomputing activations") as caught:
        resolve(parse_request(body), training=file, seed=1)
    assert caught.value.param == "ext.compute.gradient_checkpointing"
