"""FSDP2 on two gloo ranks: the losses of one rank, the same files, resumed by either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunery import catalogue
from tunery.errors import CheckpointCorrupt, NotSupported
from tunery.spec import Checkpoints, Compute, Use
from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.engines import engine_for
from tunery.training.engines.fsdp import blocks
from tunery.training.hooks import StepHook
from tunery.training.optimizer import OptimizerSettings
from tunery.training.protocol import EXIT_DONE, read_event
from tunery.training.types import AdapterRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.training.protocol import RunOrder

REPOSITORY = Path(__file__).parents[3]
RUNS = Path(__file__).with_name("rank_runs.py")
CONFIG = {"max_steps": 4, "batch_size": 5, "weight_decay": 0.1, "max_grad_norm": 0.5}
LEARNT = {"batch_size": 5, "max_steps": 4, "learning_rate": 1e-2, "max_length": 64}
STEP_2 = "checkpoints/step-00000002/resume"
EXPORT = "checkpoints/step-00000004/export"

PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": f"count {i}"}]},
        "preferred_output": [{"role": "assistant", "content": "yes" * (i % 3 + 1)}],
        "non_preferred_output": [{"role": "assistant", "content": "no" * (i % 4 + 1)}],
    }
    for i in range(10)
]


def alone(order: RunOrder, folder: Path) -> list[Any]:
    folder.mkdir()
    events: list[Any] = []
    assert program.run(order, folder, events.append, StopFlag()) == EXIT_DONE
    return events


def on_two_ranks(orders: Mapping[str, RunOrder], home: Path) -> dict[str, list[Any]]:
    """One after another, in the same two processes; each in a folder of its name."""
    folders = [home / name for name in orders]
    for folder, order in zip(folders, orders.values(), strict=True):
        folder.mkdir()
        (folder / "run.json").write_text(order.model_dump_json())
    done = subprocess.run(
        [sys.executable, RUNS, *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return {
        name: [
            read_event(line) for line in (home / name / "events.jsonl").read_bytes().splitlines()
        ]
        for name in orders
    }


def series(events: list[Any], name: str) -> dict[int, float]:
    points = [event for event in events if event.kind == "metrics"]
    return {e.step: e.values[name] for e in points if name in e.values}


def compute(strategy: str, **more: Any) -> dict[str, Any]:
    ranks = 1 if strategy == "single" else 2
    return {
        "compute": Compute(gpus=ranks, strategy=strategy, micro_batch_tokens=48, **more),  # type: ignore[arg-type]
        "checkpoints": Checkpoints(every_steps=2),
    }


def close(ours: list[Any], theirs: list[Any], *names: str) -> None:
    for name in names or ("train_loss", "grad_norm"):
        expected = series(theirs, name)
        assert expected, name
        assert series(ours, name) == pytest.approx(expected, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_have_the_losses_of_one_and_resume_to_them(
    make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    rows, valid = chats(13), chats(5, seed=1)

    def order(strategy: str, resume: Path | None = None, **more: Any) -> RunOrder:
        found = {"resume_path": str(resume / STEP_2)} if resume else None
        return make_order(  # type: ignore[no-any-return]
            rows, valid, config=CONFIG, order=found, **compute(strategy, **more)
        )

    single = alone(order("single"), tmp_path / "single")
    runs = on_two_ranks(
        {
            "fsdp": order("fsdp"),
            "again": order("fsdp", tmp_path / "fsdp"),
            "after_one": order("fsdp", tmp_path / "single"),
            "offloaded": order("fsdp", offload="parameters"),
            "recomputed": order("fsdp", gradient_checkpointing=True),
        },
        tmp_path,
    )
    for name in ("fsdp", "offloaded", "recomputed"):
        close(runs[name], single, "train_loss", "valid_loss", "grad_norm", "learning_rate")
    features = next(event for event in runs["offloaded"] if event.kind == "start").features
    said = tuple(features[name] for name in ("strategy", "ranks", "offload"))
    assert said == ("fsdp", 2, "parameters")

    # The resume files are those of one rank, so either may go on from the other's.
    ours, theirs = (
        load_file(tmp_path / name / STEP_2 / "optimizer.safetensors") for name in ("fsdp", "single")
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-3)
    last = {step: loss for step, loss in series(runs["fsdp"], "train_loss").items() if step > 2}
    assert series(runs["again"], "train_loss") == last
    assert series(runs["after_one"], "train_loss") == pytest.approx(last, abs=1e-4)
    one = alone(order("single", tmp_path / "fsdp"), tmp_path / "one")
    assert series(one, "train_loss") == pytest.approx(last, abs=1e-4)

    logits = []
    for name in ("single", "fsdp"):
        model = AutoModelForCausalLM.from_pretrained(base_model)
        tuned = PeftModel.from_pretrained(model, tmp_path / name / EXPORT)
        with torch.no_grad():
            logits.append(tuned(torch.arange(8)[None]).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    configs = [
        json.loads((tmp_path / name / EXPORT / "adapter_config.json").read_text())
        for name in ("single", "fsdp")
    ]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whole_models_references_and_half_precision_are_divided_too(
    lab: Any, make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    tied = tmp_path / "tied"
    shutil.copytree(base_model, tied)
    lab.llama(
        vocab_size=261, max_position_embeddings=256, tie_word_embeddings=True
    ).save_pretrained(tied)

    def orders(strategy: str) -> dict[str, RunOrder]:
        pairs = make_order(PAIRS, format="preference", config=CONFIG, **compute(strategy))
        apart = tmp_path / "pairs.jsonl"
        shutil.copy(pairs.training_path, apart)  # The next order's rows take its place.
        dpo = pairs.spec.model_copy(update={"method": Use(type="dpo", config=LEARNT)})
        full = Use(type="full")
        slow = {**CONFIG, "learning_rate": 1e-3}
        return {
            "dpo": pairs.model_copy(update={"spec": dpo, "training_path": str(apart)}),
            "half": make_order(chats(9), config=CONFIG, **compute(strategy, precision="bf16")),
            "full": make_order(chats(9), base=tied, adapter=full, config=slow, **compute(strategy)),
        }

    singles = {n: alone(o, tmp_path / f"one-{n}") for n, o in orders("single").items()}
    divided = on_two_ranks(orders("fsdp"), tmp_path)
    close(divided["full"], singles["full"])
    close(divided["dpo"], singles["dpo"], "train_loss", "grad_norm", "train_rewards/margins")
    # Sums of bfloat16 gradients depend on how they are split.
    losses = series(singles["half"], "train_loss")
    assert series(divided["half"], "train_loss") == pytest.approx(losses, abs=2e-2)

    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / EXPORT).state_dict()
        for name in ("one-full", "full")
    )
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=1e-3)


def settings(**more: Any) -> OptimizerSettings:
    return OptimizerSettings(1e-3, "constant", 0, 10, **more)


@pytest.mark.parametrize("name", ["prompt", "prefix", "p_tuning"])
def test_the_base_of_a_soft_prompt_is_not_divided(name: str, lab: Any) -> None:
    entry = catalogue.find("adapters", name)
    run = AdapterRun(lab.llama(), "CAUSAL_LM", None, 0, "example/base")  # type: ignore[arg-type]
    model = entry.apply(entry.Config(), run)
    with pytest.raises(NotSupported, match="cannot divide the base of a soft prompt") as caught:
        engine_for("fsdp").prepare(model, settings())
    assert (caught.value.param, caught.value.hint) == ("ext.compute.strategy", "use ddp")
    assert entry.strategies is not None
    assert "fsdp" not in entry.strategies


def test_what_parts_of_tensors_do_not_allow_is_refused_by_name() -> None:
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    scalar = torch.nn.Module()
    scalar.scale = torch.nn.Parameter(torch.ones(()))
    plain = torch.nn.Linear(2, 2)
    for model, given, words in (
        (mixed, settings(), "several"),
        (scalar, settings(), "single numbers"),
        (plain, settings(hook=StepHook()), "each step's gradients"),
    ):
        with pytest.raises(NotSupported, match=words):
            engine_for("fsdp").prepare(model, given)


def test_blocks_are_what_the_model_repeats_unless_they_share(lab: Any) -> None:
    tuned = lab.lora()
    base = tuned.get_base_model()
    assert blocks(base) == list(base.model.layers)

    layers = base.model.layers
    layers[1].mlp.up_proj.base_layer.weight = layers[0].mlp.up_proj.base_layer.weight
    assert blocks(base) == []


def test_a_state_of_other_parameters_is_refused() -> None:
    engine: Any = engine_for("fsdp")
    engine._trained = {"a": torch.zeros(2)}
    good = {f"a.{part}": torch.zeros(2) for part in ("value", "exp_avg", "exp_avg_sq")}
    engine._check(good)
    with pytest.raises(CheckpointCorrupt, match="not those of this run"):
        engine._check({**good, "a.value": torch.zeros(3)})
