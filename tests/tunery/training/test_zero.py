"""DeepSpeed on two gloo ranks, for real: the losses of one rank, resumed and loaded like any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tunery import catalogue
from tunery.errors import CheckpointCorrupt, NotSupported, OutOfMemory
from tunery.spec import Checkpoints, Compute, Use
from tunery.training import memory, program
from tunery.training.collate import collate
from tunery.training.control import StopFlag
from tunery.training.engines import engine_for
from tunery.training.losses import HeadPolicy, TokenLossComputer
from tunery.training.optimizer import OptimizerSettings
from tunery.training.protocol import EXIT_DONE, read_event
from tunery.training.types import AdapterRun, Document, Example

if TYPE_CHECKING:
    from tunery.training.protocol import RunOrder

REPOSITORY = Path(__file__).parents[3]
# Five examples a step in micro-batches of at most 48 tokens: ranks get unlike numbers of them.
CONFIG = {"max_steps": 4, "batch_size": 5, "weight_decay": 0.1, "max_grad_norm": 0.5}
STEP_2 = "checkpoints/step-00000002/resume"
EXPORT = "checkpoints/step-00000004/export"


def one_rank(order: RunOrder, folder: Path) -> list[Any]:
    folder.mkdir()
    events: list[Any] = []
    assert program.run(order, folder, events.append, StopFlag()) == EXIT_DONE
    return events


def two_ranks(order: RunOrder, folder: Path) -> list[Any]:
    """Through the launcher, in processes of their own."""
    folder.mkdir()
    (folder / "run.json").write_text(order.model_dump_json())
    reader, writer = os.pipe()
    with (folder / "trainer.log").open("wb") as log, os.fdopen(reader, "rb") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunery.training.program", folder, "--events-fd", str(writer)],
            pass_fds=[writer],
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        os.close(writer)
        try:
            events = [read_event(line) for line in lines]
            code = process.wait(60)
        finally:
            process.kill()
            process.wait()
    assert code == EXIT_DONE, (folder / "trainer.log").read_text()[-4000:]
    return events


def series(events: list[Any], name: str) -> dict[int, float]:
    points = [event for event in events if event.kind == "metrics"]
    return {e.step: e.values[name] for e in points if name in e.values}


def compute(strategy: str) -> dict[str, Any]:
    ranks = 1 if strategy == "single" else 2
    return {
        "compute": Compute(gpus=ranks, strategy=strategy, micro_batch_tokens=48),  # type: ignore[arg-type]
        "checkpoints": Checkpoints(every_steps=2),
    }


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STEP_2 / "optimizer.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_have_the_losses_of_one_and_resume_to_them(
    stage: int, make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    rows, valid = chats(13), chats(5, seed=1)
    strategy = f"deepspeed_zero{stage}"

    def order(strategy: str, **more: Any) -> RunOrder:
        return make_order(rows, valid, config=CONFIG, order=more, **compute(strategy))  # type: ignore[no-any-return]

    single = one_rank(order("single"), tmp_path / "single")
    zero = two_ranks(order(strategy), tmp_path / "zero")
    for name in ("train_loss", "valid_loss", "grad_norm", "learning_rate"):
        assert series(zero, name) == pytest.approx(series(single, name), abs=1e-4), name
    features = next(event for event in zero if event.kind == "start").features
    assert (features["strategy"], features["ranks"]) == (strategy, 2)

    # The resume files are those of one rank, so either may go on from the other's.
    ours, theirs = state_of(tmp_path / "single"), state_of(tmp_path / "zero")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-3)
    resume = str(tmp_path / "zero" / STEP_2)
    last = {step: loss for step, loss in series(zero, "train_loss").items() if step > 2}
    again = two_ranks(order(strategy, resume_path=resume), tmp_path / "again")
    assert series(again, "train_loss") == pytest.approx(last, abs=1e-6)
    alone = one_rank(order("single", resume_path=resume), tmp_path / "alone")
    assert series(alone, "train_loss") == pytest.approx(last, abs=1e-4)

    _loads_like_any(base_model, tmp_path / "single" / EXPORT, tmp_path / "zero" / EXPORT)


def _loads_like_any(base: Path, one: Path, other: Path) -> None:
    """Both exports, by stock PEFT."""
    configs = [json.loads((e / "adapter_config.json").read_text()) for e in (one, other)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    logits = []
    for export in (one, other):
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(model, export)(torch.arange(8)[None]).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_weights_of_a_model_divided_among_ranks_come_out_whole(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    adapter = Use(type="full")
    config = {**CONFIG, "learning_rate": 1e-3}

    def order(strategy: str) -> RunOrder:
        return make_order(chats(9), config=config, adapter=adapter, **compute(strategy))  # type: ignore[no-any-return]

    single = one_rank(order("single"), tmp_path / "single")
    zero = two_ranks(order("deepspeed_zero3"), tmp_path / "zero")
    losses = series(single, "train_loss")
    assert series(zero, "train_loss") == pytest.approx(losses, abs=1e-4)
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
