"""The tables over PEFT's tuners, held against PEFT itself."""

import dataclasses
import types
import typing
from typing import Any, Literal

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tunery import catalogue
from tunery.adapters._tuner import Tuner
from tunery.errors import InvalidConfig
from tunery.models.shape import shape_of
from tunery.training.types import AdapterRun

TUNERS = {
    name: entry for name, entry in catalogue.entries("adapters").items() if isinstance(entry, Tuner)
}
every_tuner = pytest.mark.parametrize("name", TUNERS)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
GPT2 = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64)


def shape(config: Any) -> Any:
    return shape_of(config.to_dict()).model_copy(update={"num_labels": None})


def settings(name: str, **more: Any) -> Any:
    entry: Any = TUNERS[name]
    example = {key: value for key, value in entry.example.items() if key != "type"}
    return entry.Config(**{**example, **more})


def apply(name: str, model: Any, **more: Any) -> Any:
    run = AdapterRun(model, "CAUSAL_LM", None, 7, "example/base")  # type: ignore[arg-type]
    return TUNERS[name].apply(settings(name, **more), run)


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def alternatives(annotation: Any) -> set[Any]:
    """The classes and literal values that a type hint allows."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(alternatives(part) for part in typing.get_args(annotation)))
    if origin is Literal:
        return set(typing.get_args(annotation))
    return {origin or annotation}


def fields_of(name: str) -> dict[str, Any]:
    cls = getattr(peft, TUNERS[name].peft_config)
    return {field.name: field for field in dataclasses.fields(cls)}


@every_tuner
def test_its_fields_and_what_is_fixed_are_pefts(name: str) -> None:
    entry: Any = TUNERS[name]
    seed = {entry.seed_field} if entry.seed_field else set()
    assert {*entry.Config.model_fields, *entry.fixed, *seed} <= fields_of(name).keys()
    assert entry.departs <= entry.Config.model_fields.keys()


@every_tuner
def test_its_defaults_are_pefts(name: str) -> None:
    entry: Any = TUNERS[name]
    known = fields_of(name)
    differ = {
        field
        for field, ours in entry.Config.model_fields.items()
        if repr(ours.default) != repr(known[field].default)
    }
    assert differ == {"target_modules", *entry.departs}


@every_tuner
def test_its_types_are_within_pefts(name: str) -> None:
    entry: Any = TUNERS[name]
    hints = typing.get_type_hints(getattr(peft, entry.peft_config))
    ours = typing.get_type_hints(entry.Config)
    for field in entry.Config.model_fields.keys() - {"target_modules", "layers_to_transform"}:
        theirs = alternatives(hints[field])
        strange = [
            part
            for part in alternatives(ours[field])
            if part not in theirs and type(part) not in theirs
        ]
        assert strange == [], field


@every_tuner
def test_a_seed_of_its_own_is_the_runs(name: str) -> None:
    entry: Any = TUNERS[name]
    if entry.seed_field is None:
        pytest.skip("draws from torch's generator")
    model = apply(name, LlamaForCausalLM(LLAMA))
    assert getattr(model.peft_config["default"], entry.seed_field) == 7


@every_tuner
def test_chosen_modules_and_layers_are_counted(name: str) -> None:
    entry: Any = TUNERS[name]
    more: dict[str, Any] = {"target_modules": ["q_proj", "mlp.up_proj"]}
    if "layers_to_transform" in entry.Config.model_fields:
        more["layers_to_transform"] = [0, 2]
    model = apply(name, LlamaForCausalLM(LLAMA), **more)
    expected = entry.trainable_parameters(settings(name, **more), shape(LLAMA))
    assert trainable(model) == expected


@every_tuner
def test_gpt2_is_counted_or_refused(name: str) -> None:
    entry: Any = TUNERS[name]
    if not entry.transposed:
        with pytest.raises(InvalidConfig, match="stored transposed"):
            entry.trainable_parameters(settings(name), shape(GPT2))
        with pytest.raises(InvalidConfig, match="stored transposed"):
            apply(name, GPT2LMHeadModel(GPT2))
        return
    model = apply(name, GPT2LMHeadModel(GPT2))
    assert trainable(model) == entry.trainable_parameters(settings(name), shape(GPT2))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@every_tuner
def test_it_trains_on_a_base_in_half_precision(name: str) -> None:
    pass_in_half_precision(name, half_adapter=TUNERS[name].half_precision)


@pytest.mark.parametrize(
    "name",  # AdaLoRA runs, but takes its ranks away where the masters do not see it
    [name for name in TUNERS if not TUNERS[name].half_precision and name != "adalora"],
)
def test_where_it_says_no_peft_cannot_run_it_in_half_precision(name: str) -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        pass_in_half_precision(name, half_adapter=True)


def pass_in_half_precision(name: str, *, half_adapter: bool) -> None:
    """One forward and backward pass; `half_adapter` as the trainer casts what trains."""
    model = apply(name, LlamaForCausalLM(LLAMA).bfloat16())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.bfloat16() if half_adapter else parameter.data.float()
    ids = torch.arange(8)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("lokr", {"r": 2}),
    ("lokr", {"r": 2, "decompose_both": True, "decompose_factor": 4}),
    ("lokr", {"decompose_factor": 5}),
    ("glora", {"config_A_B": "vector", "config_C": "none", "config_D_E": "none"}),
    ("glora", {"config_A_B": "constant"}),
    ("gralora", {"hybrid_r": 4}),
    ("lily", {"stride_A": 2, "num_B": 3}),
    ("miss", {"init_weights": "bat"}),
    ("miss", {"init_weights": "mini", "mini_r": 4}),
    ("oft", {"block_share": True}),
    ("osf", {"effective_rank": 10}),
    ("osf", {"effective_rank": None}),
    ("peanut", {"depth": 2}),
    ("psoft", {"psoft_orth": False, "psoft_mag_a": False}),
    ("road", {"variant": "road_2"}),
    ("road", {"variant": "road_4"}),
    ("supertuning", {"r": 4}),
    ("tinylora", {"weight_tying": 0.5}),
    ("tinylora", {"weight_tying": 1.0}),
    ("tinylora", {"weight_tying": 0.85}),
]


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_the_formula_counts_other_forms_too(name: str, more: dict[str, Any]) -> None:
    entry: Any = TUNERS[name]
    model = apply(name, LlamaForCausalLM(LLAMA), **more)
    assert trainable(model) == entry.trainable_parameters(settings(name, **more), shape(LLAMA))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("boft", {"boft_block_size": 5}, "boft_block_size: 5 does not divide the 32 inputs"),
        ("c3a", {"block_size": 12}, "block_size: 12 does not divide the 32 inputs"),
        ("c3a", {"block_size": 32}, "block_size: 32 does not divide the 16 outputs"),
        ("gralora", {"r": 9, "gralora_k": 3}, "gralora_k: 3 does not divide"),
        ("miss", {"r": 33}, "r: 33 is more than q_proj allows"),
        ("oft", {"oft_block_size": 10}, "oft_block_size: 10 does not divide"),
        ("osf", {"effective_rank": 32}, "nothing to train"),
        ("psoft", {"r": 17}, "r: 17 is more than k_proj allows"),
        ("road", {"group_size": 64}, "group_size: 64 does not divide the 32 outputs"),
        ("shira", {"r": 11}, "r: 11 is more than k_proj allows"),
        ("supertuning", {"sparsity": 0.9999}, "leaves nothing to train"),
        ("vblora", {"vector_length": 7}, "vector_length: 7 does not divide"),
        ("waveft", {"n_frequency": 513}, "n_frequency: 513 is more than k_proj allows"),
    ],
)
def test_what_does_not_fit_is_refused_by_shape_and_by_model(
    name: str, more: dict[str, Any], message: str
) -> None:
    entry: Any = TUNERS[name]
    with pytest.raises(InvalidConfig, match=message) as caught:
        entry.trainable_parameters(settings(name, **more), shape(LLAMA))
    assert caught.value.param == next(reversed(more))
    with pytest.raises(InvalidConfig):
        apply(name, LlamaForCausalLM(LLAMA), **more)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("hra", {"r": 3}, "does not start as the base"),
        ("gralora", {"r": 15}, "not divisible by gralora_k"),
        ("lokr", {"decompose_factor": 0}, "at least 1 row"),
        ("supertuning", {"lora_alpha": 4}, "need r"),
        ("vblora", {"topk": 65}, "more than num_vectors"),
        ("vera", {"target_modules": [".*"]}, "is not a module's name"),
        ("vera", {"layers_to_transform": [-1]}, "count from 0"),
    ],
)
def test_contradictions_are_refused(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(name, **more)
