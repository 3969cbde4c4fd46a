"""DeepSpeed on two gloo ranks, for real: the losses of one rank, resumed and loaded like any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.tunery.training.ranks import (
    CONFIG,
    EXPORT,
    STEP_2,
    alone,
    close,
    compute,
    features,
    loads_like_any,
    on_two_ranks,
    resume_state,
    series,
)
from tunery import catalogue
from tunery.errors import CheckpointCorrupt, NotSupported, OutOfMemory
from tunery.spec import Use
from tunery.training import memory
from tunery.training.collate import collate
from tunery.training.engines import engine_for
from tunery.training.losses import HeadPolicy, TokenLossComputer
from tunery.training.optimizer import OptimizerSettings
from tunery.training.types import AdapterRun, Document, Example

if TYPE_CHECKING:
    from pathlib import Path

    from tunery.training.protocol import RunOrder


STAGES = (0, 1, 2, 3)
OFFLOADS = {2: "optimizer", 3: "parameters"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_have_the_losses_of_one_and_resume_to_them(
    make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    rows, valid = chats(13), chats(5, seed=1)

    def order(strategy: str, resume: Path | None = None, offload: str = "none") -> RunOrder:
        found = {"resume_path": str(resume / STEP_2)} if resume else None
        return make_order(  # type: ignore[no-any-return]
            rows, valid, config=CONFIG, order=found, **compute(strategy, offload=offload)
        )

    single = alone(order("single"), tmp_path / "single")
    orders: dict[str, RunOrder] = {}
    for stage in STAGES:
        strategy, before = f"deepspeed_zero{stage}", tmp_path / f"zero{stage}"
        orders[f"zero{stage}"] = order(strategy)
        orders[f"again{stage}"] = order(strategy, before)
        if stage in OFFLOADS:
            orders[f"offloaded{stage}"] = order(strategy, before, OFFLOADS[stage])
    runs = on_two_ranks(orders, tmp_path)
    for stage in STAGES:
        zero, folder = runs[f"zero{stage}"], tmp_path / f"zero{stage}"
        close(zero, single, "train_loss", "valid_loss", "grad_norm", "learning_rate")
        assert features(zero)["strategy"] == f"deepspeed_zero{stage}"

        # The resume files are those of one rank, so either may go on from the other's.
        ours, theirs = resume_state(tmp_path / "single"), resume_state(folder)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-3)
        last = {step: loss for step, loss in series(zero, "train_loss").items() if step > 2}
        for name in {f"again{stage}", f"offloaded{stage}"} & runs.keys():
            assert series(runs[name], "train_loss") == pytest.approx(last, abs=1e-6)
        one = alone(order("single", folder), tmp_path / f"alone{stage}")
        assert series(one, "train_loss") == pytest.approx(last, abs=1e-4)

        loads_like_any(base_model, tmp_path / "single", folder)
    for stage, kind in OFFLOADS.items():
        assert features(runs[f"offloaded{stage}"])["offload"] == kind


def test_what_is_offloaded_is_told_to_deepspeed_by_name() -> None:
    host = {"device": "cpu", "pin_memory": False}
    for stage, offload, told in (
        (2, "none", {}),
        (2, "optimizer", {"offload_optimizer": host}),
        (3, "parameters", {"offload_optimizer": host, "offload_param": host}),
    ):
        engine: Any = engine_for(f"deepspeed_zero{stage}", offload)
        engine._device, engine.settings = torch.device("cpu"), settings()
        config = engine._config(half=False)["zero_optimization"]
        assert {k: v for k, v in config.items() if k.startswith("offload")} == told


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_weights_of_a_model_divided_among_ranks_come_out_whole(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    adapter = Use(type="full")
    config = {**CONFIG, "learning_rate": 1e-3}

    def order(strategy: str) -> RunOrder:
        return make_order(chats(9), config=config, adapter=adapter, **compute(strategy))  # type: ignore[no-any-return]

    single = alone(order("single"), tmp_path / "single")
    zero = on_two_ranks({"zero": order("deepspeed_zero3")}, tmp_path)["zero"]
    close(zero, single, "train_loss")
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / EXPORT).state_dict()
        for name in ("single", "zero")
    )
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=1e-3)


def test_running_out_of_memory_among_others_ends_the_run_at_once() -> None:
    """Caught, it would leave the other ranks waiting inside the forward pass for ever."""
    refusal = torch.OutOfMemoryError("CUDA out of memory")
    with memory.attempt() as tried:
        raise refusal
    assert tried.failed
    with pytest.raises(OutOfMemory, match="does not fit"), memory.attempt(alone=False):
        raise refusal
    assert engine_for("deepspeed_zero3").even
    assert engine_for("fsdp").even


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )


def test_a_divided_head_is_never_read_outside_its_own_forward(
    tiny_llama: LlamaForCausalLM,
) -> None:
    base = tiny_llama.requires_grad_(False)
    document = Document(np.arange(4), np.arange(4))
    batch = collate([Example((document,), None, 0)], layout="rows", pad_id=0)
    losses = TokenLossComputer(base, HeadPolicy(path="chunked"))
    losses(base, batch)
    base.lm_head.weight.ds_id = 7
    losses(base, batch)
    assert losses.used == {"chunked", "plain"}


def settings() -> OptimizerSettings:
    return OptimizerSettings(1e-3, "constant", 0, 10)


def test_stage_0_says_that_it_keeps_no_masters() -> None:
    engine = engine_for("deepspeed_zero0")
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    with pytest.raises(NotSupported, match="keeps no float32 weights") as caught:
        engine.prepare(model, settings())
    assert caught.value.param == "ext.compute.strategy"


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_stage_3_divides_no_soft_prompts(name: str, tiny_llama: LlamaForCausalLM) -> None:
    entry = catalogue.find("adapters", name)
    run = AdapterRun(tiny_llama, "CAUSAL_LM", None, 0, "example/base")  # type: ignore[arg-type]
    model = entry.apply(entry.Config(), run)
    with pytest.raises(NotSupported, match="cannot divide a soft prompt") as caught:
        engine_for("deepspeed_zero3").prepare(model, settings())
    assert "deepspeed_zero2" in (caught.value.hint or "")


def test_a_state_of_other_parameters_is_refused() -> None:
    engine: Any = engine_for("deepspeed_zero2")
    engine._shapes = {"a": torch.Size([2])}
    good = {f"a.{part}": torch.zeros(2) for part in ("value", "exp_avg", "exp_avg_sq")}
    engine._check(good)
    with pytest.raises(CheckpointCorrupt, match="not those of this run"):
        engine._check({**good, "a.value": torch.zeros(3)})
