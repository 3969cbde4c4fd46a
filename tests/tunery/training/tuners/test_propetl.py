"""ProPETL's masks and files, and how PEFT comes to know it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
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

from tunery.adapters.propetl import Propetl, PropetlConfig
from tunery.errors import InvalidConfig
from tunery.models.shape import shape_of
from tunery.training.checkpoint import export_writer
from tunery.training.tuners.propetl import PropetlLayer, largest
from tunery.training.types import AdapterRun

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
IDS = torch.arange(1, 9)[None]


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def applied(model: Any, **config: Any) -> Any:
    causal = "LMHead" in type(model).__name__ or "CausalLM" in type(model).__name__
    task = "CAUSAL_LM" if causal else "FEATURE_EXTRACTION"
    run = AdapterRun(model, task, None, 7, "example/base")  # type: ignore[arg-type]
    return Propetl().apply(PropetlConfig(**{"bottleneck": 4, **config}), run)


def layers(model: Any) -> list[PropetlLayer]:
    return [module for module in model.modules() if isinstance(module, PropetlLayer)]


def moved(model: Any) -> Any:
    """As if trained: no matrix is zero any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_mask_keeps_exactly_its_share() -> None:
    scores = torch.tensor([[0.1, 0.5], [0.4, -1.0]])
    assert largest(scores, 0.5).tolist() == [[False, True], [True, False]]
    assert largest(scores, 0.01).sum() == 1
    assert largest(torch.zeros(10, 10), 0.3).sum() == 30


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LLAMA),
        BertModel(BertConfig(**SIZES, num_attention_heads=4)),
        DistilBertModel(DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4)),
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_there_is_a_layer_behind_each_feed_forward_and_one_prototype(model: Any) -> None:
    shape = shape_of(model.config.to_dict()).model_copy(update={"num_labels": None})
    tuned = applied(model)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert trained == Propetl().trainable_parameters(PropetlConfig(bottleneck=4), shape)
    found = layers(tuned)
    assert len(found) == 3
    assert len({id(layer.propetl_prototype["default"]) for layer in found}) == 1


def test_counts_by_hand() -> None:
    shape = shape_of(LLAMA.to_dict()).model_copy(update={"num_labels": None})
    expected = 2 * 32 * 4 + 4 + 32 + 3 * 2 * 32 * 4
    assert Propetl().trainable_parameters(PropetlConfig(bottleneck=4), shape) == expected
    unknown = shape.model_copy(update={"model_type": "unheard-of"})
    with pytest.raises(InvalidConfig, match="is not known"):
        Propetl().trainable_parameters(PropetlConfig(), unknown)


def test_a_layer_adds_its_masked_network_to_what_it_wraps() -> None:
    layer: Any = layers(moved(applied(llama(), kept=0.25)))[1]
    x = torch.randn(2, 48)
    h = layer.base_layer(x)
    whole, scores = layer.propetl_prototype["default"], layer.propetl_scores["default"]
    down = whole.down * largest(scores.down, 0.25)
    up = whole.up * largest(scores.up, 0.25)
    assert int((down != 0).sum()) == 32
    expected = h + functional.relu(h @ down.T + whole.down_bias) @ up.T + whole.up_bias
    torch.testing.assert_close(layer(x), expected)


def test_masks_differ_between_layers_and_scores_learn_through_them() -> None:
    model = moved(applied(llama()))
    model(input_ids=IDS, labels=IDS).loss.backward()
    scores = [layer.propetl_scores["default"].down for layer in layers(model)]
    assert not torch.equal(largest(scores[0], 0.5), largest(scores[1], 0.5))
    assert all(score.grad.any() for score in scores)


def test_the_file_holds_one_prototype_and_masks(tmp_path: Path) -> None:
    model = moved(applied(llama()))
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    export_writer(model, weights)(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    masks = [tensor for name, tensor in state.items() if "scores" in name]
    assert len(masks) == 2 * 3
    assert all(mask.dtype == torch.bool and mask.float().mean() == 0.5 for mask in masks)
    assert len(state) - len(masks) == 4
    again = PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_it_is_not_merged() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        applied(llama()).merge_and_unload()


@pytest.mark.parametrize("order", ["peft, tunery.adapters", "tunery.adapters, peft"])
def test_peft_knows_it_whichever_is_imported_first(order: str) -> None:
    code = (
        f"import {order}\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "print('PROPETL' in known, peft.PeftType('PROPETL').name, peft.__loader__ is not None)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True PROPETL True"
