"""MAM's two parts by hand, and its prefix under every kind of mask."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from tunery.adapters.mam import Mam, MamConfig
from tunery.errors import InvalidConfig
from tunery.models.shape import shape_of
from tunery.training import packing
from tunery.training.tuners.mam import ParallelLayer, PrefixLayer
from tunery.training.types import AdapterRun

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 9)[None]
NAMES = ("sdpa", "eager")


def llama(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def bert(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return BertModel._from_config(BertConfig(**SIZES), attn_implementation=attention).eval()


def moved(model: Any, **config: Any) -> Any:
    """With the adapter, as if trained: no tensor is as it started."""
    task = "CAUSAL_LM" if "LM" in type(model).__name__ else "FEATURE_EXTRACTION"
    run = AdapterRun(model, task, None, 7, "example/base")  # type: ignore[arg-type]
    settings = {"num_virtual_tokens": 3, "bottleneck": 4, **config}
    tuned = Mam().apply(MamConfig(**settings), run)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return tuned


def said(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask)
    found: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


@pytest.mark.parametrize(
    "model",
    [
        llama(),
        bert(),
        DistilBertModel(DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4)),
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64)),
        GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
        Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=2)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_both_parts_train_in_every_layer_of_every_family(model: Any) -> None:
    shape = shape_of(model.config.to_dict()).model_copy(update={"num_labels": None})
    tuned = moved(model)
    settings = MamConfig(num_virtual_tokens=3, bottleneck=4)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == Mam().trainable_parameters(settings, shape)
    out = tuned(input_ids=IDS)
    (out.logits if "logits" in out else out.last_hidden_state).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_counts_by_hand() -> None:
    shape = shape_of(llama().config.to_dict()).model_copy(update={"num_labels": None})
    settings = MamConfig(num_virtual_tokens=3, bottleneck=4)
    assert Mam().trainable_parameters(settings, shape) == 3 * (2 * 3 * 16 + 2 * 32 * 4 + 4 + 32)
    with pytest.raises(InvalidConfig, match="is not known"):
        Mam().trainable_parameters(settings, shape.model_copy(update={"model_type": "unheard-of"}))


@pytest.mark.parametrize("attention", NAMES)
def test_an_attention_sees_its_prefix_and_what_it_saw_before(attention: str) -> None:
    model = moved(bert(attention))
    layer = next(m for m in model.modules() if isinstance(m, PrefixLayer))
    module = model.get_base_model().encoder.layer[0].attention.self
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        got = module(x)[0]
        prefix = layer.prefix()
        assert prefix is not None

        def heads(linear: Any) -> torch.Tensor:
            return linear(x).view(2, 5, 4, 8).transpose(1, 2)  # type: ignore[no-any-return]

        keys, values = (
            torch.cat((part.expand(2, -1, -1, -1), heads(linear)), dim=2)
            for part, linear in zip(prefix, (module.key, module.value), strict=True)
        )
        weights = (heads(module.query) @ keys.transpose(2, 3) / 8**0.5).softmax(-1)
        expected = (weights @ values).transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(got, expected)


def test_the_feed_forwards_input_goes_through_the_bottleneck_beside_it() -> None:
    model = moved(llama(), scaling=2.5)
    mlp = model.get_base_model().model.layers[1].mlp
    layer: Any = next(m for m in mlp.modules() if isinstance(m, ParallelLayer))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        with model.disable_adapter():
            plain = mlp(x)
        inside = layer.mam_parallel["default"]
        expected = plain + 2.5 * inside.up(functional.relu(inside.down(x)))
        torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("build", [llama, bert])
def test_both_kinds_of_attention_say_the_same(build: Any) -> None:
    torch.testing.assert_close(
        said(moved(build("sdpa")), IDS), said(moved(build("eager")), IDS), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("attention", NAMES)
@pytest.mark.parametrize("build", [llama, bert])
def test_padding_changes_nothing(build: Any, attention: str) -> None:
    model = moved(build(attention))
    padded = functional.pad(IDS, (0, 4))
    mask = (padded > 0).long()
    torch.testing.assert_close(
        said(model, padded, mask)[:, :8], said(model, IDS), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("attention", NAMES)
def test_no_token_of_a_decoder_sees_a_later_one(attention: str) -> None:
    model = moved(llama(attention))
    torch.testing.assert_close(
        said(model, IDS)[:, :5], said(model, IDS[:, :5]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("attention", NAMES)
def test_generating_with_a_cache_is_as_reading_at_once(attention: str) -> None:
    model = moved(llama(attention))
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    cached = model.generate(input_ids=IDS, attention_mask=mask, **given)
    whole = model.generate(input_ids=IDS, attention_mask=mask, use_cache=False, **given)
    assert torch.equal(cached, whole)
    assert said(model, cached)[0, 7:-1].argmax(-1).tolist() == cached[0, 8:].tolist()


def test_documents_do_not_share_rows_where_their_attention_is_taken() -> None:
    model = moved(llama())
    assert packing.switch_on(model.get_base_model()) is False
    assert packing.switch_on(llama()) is True


def test_it_is_not_merged() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        moved(llama()).merge_and_unload()
