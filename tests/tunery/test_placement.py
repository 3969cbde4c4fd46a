"""Which strategy a run gets, and why: worked out by hand for the shape of an 8B Llama."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from tunery.entries import ModelShape
from tunery.errors import UnsupportedCombination
from tunery.placement import OFFLOADS, Load, memory_needed
from tunery.request import parse_request
from tunery.resolve import DeviceFacts, Resolved, resolve
from tunery.spec import Compute, DataFile, Strategy

GB = 10**9
LLAMA_8B = ModelShape(
    architecture="LlamaForCausalLM",
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    linear_shapes={"q_proj": (4096, 4096), "v_proj": (4096, 1024)},
    parameters=8_030_261_248,
)
CHATS = DataFile(file_id="file-train", sha256="0" * 64, format="chat", rows=100, size_bytes=40_000)


def placed(
    memory_gb: float | None, adapter: str = "lora", kind: Any = "cuda", **compute: Any
) -> Resolved:
    request = parse_request(
        {
            "model": "org/base",
            "training_file": "file-train",
            "method": {"type": "supervised", "supervised": {"adapter": {"type": adapter}}},
            "ext": {"compute": compute},
        }
    )
    memory = None if memory_gb is None else int(memory_gb * GB)
    facts = DeviceFacts(kind=kind, memory_bytes=memory, bf16=True)
    return resolve(request, training=CHATS, shape=LLAMA_8B, seed=5, devices=facts)


def told(found: Resolved) -> tuple[str, bool, int]:
    compute = found.spec.compute
    return compute.strategy, compute.gradient_checkpointing, compute.micro_batch_tokens


def test_memory_is_weights_and_what_trains_and_activations() -> None:
    load = Load(LLAMA_8B, trainable=1000)
    whole = memory_needed(load, Compute(precision="bf16", micro_batch_tokens=1024))
    # 2 bytes a weight, 16 a trained number; per token and layer 8 H + 4 I numbers of 2 bytes;
    # logits in float32.
    activations = 1024 * 32 * 2 * (8 * 4096 + 4 * 14336) + 1024 * 128256 * 4
    assert whole == 2 * 8_030_261_248 + 16 * 1000 + activations

    again = Compute(precision="bf16", micro_batch_tokens=1024, gradient_checkpointing=True)
    saved = 1024 * 2 * (31 * (8 * 4096 + 4 * 14336) - 32 * 4096)
    assert whole - memory_needed(load, again) == saved


@pytest.mark.parametrize(
    ("strategy", "offload", "per_number"),
    [
        # Bytes per trained number in float32, of 4 value, 4 gradient, 8 moments, on four ranks.
        ("ddp", "none", 4 + 4 + 8),
        ("deepspeed_zero0", "none", 4 + 4 + 8),
        ("deepspeed_zero1", "none", 4 + 4 + 2),
        ("deepspeed_zero2", "none", 4 + 1 + 2),
        ("deepspeed_zero2", "optimizer", 4 + 1),
        ("deepspeed_zero3", "none", 1 + 1 + 2),
        ("deepspeed_zero3", "parameters", 1),
        ("fsdp", "none", 1 + 1 + 2),
        ("fsdp", "parameters", 0),
    ],
)
def test_each_strategy_divides_what_it_says(strategy: Any, offload: Any, per_number: int) -> None:
    shape = LLAMA_8B.model_copy(update={"vocab_size": 1, "num_hidden_layers": 10**9})
    load = Load(shape, trainable=shape.parameters)

    def need(strategy: Any, offload: Any) -> int:
        compute = Compute(gpus=4, strategy=strategy, offload=offload, micro_batch_tokens=8)
        return memory_needed(load, compute)

    activations = need("ddp", "none") - 16 * shape.parameters
    expected = per_number * shape.parameters
    # What is whole at once is two of a milliard blocks here.
    assert need(strategy, offload) - activations == pytest.approx(expected, abs=1e6)


def test_one_device_trains_alone_and_several_hold_the_model_each() -> None:
    assert told(placed(1000)) == ("single", False, 16_384)
    assert told(placed(1000, gpus=4)) == ("ddp", False, 16_384)


def test_a_smaller_micro_batch_comes_before_recomputing_and_that_before_dividing() -> None:
    # 16.1 GB of weights, 2.1 of logits, and 94.5, 47.2 or 23.6 of activations: 5.8 MB a token.
    # Recomputed, 7.3 GB are left of 94.5.
    assert told(placed(141, gpus=2)) == ("ddp", False, 16_384)
    assert told(placed(80, gpus=2)) == ("ddp", False, 8_192)
    assert told(placed(48, gpus=2)) == ("ddp", False, 4_096)
    assert told(placed(32, gpus=2)) == ("ddp", True, 16_384)
    assert told(placed(17, gpus=2))[:2] == ("fsdp", True)


def test_all_weights_of_a_large_model_are_divided() -> None:
    found = placed(80, "full", gpus=8)

    assert told(found)[:2] == ("fsdp", False)
    source = found.sources["compute.strategy"]
    assert source.startswith("auto: 8 ranks, ")
    assert "of 80.0 GB with the whole model on each" in source
    assert found.warnings == []
    assert found.estimate["gpu"]["fits"] is True


def test_an_adapter_that_fsdp_cannot_divide_stays_whole_and_is_warned_about() -> None:
    found = placed(12, "prompt", gpus=2)

    assert found.spec.compute.strategy == "ddp"
    assert [warning["code"] for warning in found.warnings] == ["may_not_fit"]
    assert "12.0 GB" in found.warnings[0]["message"]


def test_what_the_request_says_is_not_touched() -> None:
    found = placed(12, gpus=2, strategy="ddp", gradient_checkpointing=False, micro_batch_tokens=99)

    assert told(found) == ("ddp", False, 99)
    assert not {path for path in found.sources if path.startswith("compute.")} - {
        "compute.precision"
    }
    assert told(placed(1000, gradient_checkpointing=True))[1] is True


def test_without_figures_nothing_is_divided_or_recomputed() -> None:
    assert told(placed(None, gpus=2)) == ("ddp", False, 16_384)
    # Ranks on CPUs share the host's memory: to divide it saves nothing.
    assert told(placed(4, kind="cpu", gpus=2)) == ("ddp", False, 4_096)


def test_the_reasons_have_figures() -> None:
    sources = placed(32, gpus=2).sources

    assert sources["compute.strategy"] == "auto: 2 ranks, 25.6 GB of 32.0 GB"
    without, _, with_ = sources["compute.gradient_checkpointing"].partition(" without, ")
    assert without == "auto: 41.9 GB of 32.0 GB"
    assert with_ == "25.6 GB with"


def test_offloading_chooses_a_strategy_that_can() -> None:
    def strategy(offload: str, gpus: int = 2, adapter: str = "lora") -> str:
        return placed(80, adapter, offload=offload, gpus=gpus).spec.compute.strategy

    assert strategy("parameters") == "fsdp"
    assert strategy("parameters", gpus=1) == "fsdp"
    assert strategy("optimizer", adapter="full") == "deepspeed_zero2"
    with pytest.raises(UnsupportedCombination, match="trains under no strategy") as caught:
        strategy("parameters", adapter="prompt")
    assert caught.value.param == "ext.compute.offload"


@pytest.mark.parametrize("strategy", ["auto", *get_args(Strategy)])
@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_offloading_that_means_nothing_is_refused_by_name(strategy: Any, offload: Any) -> None:
    gpus = 1 if strategy == "single" else 2
    if strategy == "auto" or offload in OFFLOADS.get(strategy, ()):
        found = placed(80, strategy=strategy, offload=offload, gpus=gpus)
        assert found.spec.compute.offload == offload
        return
    with pytest.raises(UnsupportedCombination, match=repr(strategy)) as caught:
        placed(80, strategy=strategy, offload=offload, gpus=gpus)
    assert caught.value.param == "ext.compute.offload"
