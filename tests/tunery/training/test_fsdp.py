"""FSDP2 on two gloo ranks: the losses of one rank, the same files, resumed by either."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tunery.training.ranks import (
    CONFIG,
    EXPORT,
    STEP_2,
    alone,
    close,
    compute,
    features,
    free_port,
    loads_like_any,
    on_two_ranks,
    resume_state,
    series,
)
from tunery import catalogue
from tunery.errors import CheckpointCorrupt, NotSupported
from tunery.spec import Compute, Use
from tunery.training.engines import engine_for
from tunery.training.engines.fsdp import blocks, kept_whole
from tunery.training.hooks import StepHook
from tunery.training.optimizer import OptimizerSettings
from tunery.training.types import AdapterRun

if TYPE_CHECKING:
    from pathlib import Path

    from tunery.training.protocol import RunOrder

LEARNT = {"batch_size": 5, "max_steps": 4, "learning_rate": 1e-2, "max_length": 64}
PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": f"count {i}"}]},
        "preferred_output": [{"role": "assistant", "content": "yes" * (i % 3 + 1)}],
        "non_preferred_output": [{"role": "assistant", "content": "no" * (i % 4 + 1)}],
    }
    for i in range(10)
]


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
    found = features(runs["offloaded"])
    assert tuple(found[name] for name in ("strategy", "ranks", "offload")) == (
        "fsdp",
        2,
        "parameters",
    )

    # The resume files are those of one rank, so either may go on from the other's.
    ours, theirs = resume_state(tmp_path / "fsdp"), resume_state(tmp_path / "single")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-3)
    last = {step: loss for step, loss in series(runs["fsdp"], "train_loss").items() if step > 2}
    assert series(runs["again"], "train_loss") == last
    assert series(runs["after_one"], "train_loss") == pytest.approx(last, abs=1e-4)
    one = alone(order("single", tmp_path / "fsdp"), tmp_path / "one")
    assert series(one, "train_loss") == pytest.approx(last, abs=1e-4)

    loads_like_any(base_model, tmp_path / "single", tmp_path / "fsdp")


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


def test_one_device_offloads_too(
    make_order: Any, chats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(9)
    single = alone(make_order(rows, config=CONFIG, **compute("single")), tmp_path / "single")
    elastic = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**elastic, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    where = Compute(strategy="fsdp", offload="parameters", micro_batch_tokens=48)
    fsdp = alone(make_order(rows, config=CONFIG, compute=where), tmp_path / "fsdp")
    close(fsdp, single)


SAMPLE = {
    "lora": {"r": 4, "use_dora": True},  # the norm of the base's weight
    "lokr": {},
    "oft": {"oft_block_size": 16},
    "vera": {"r": 8},  # matrices that all layers share
    "unilora": {},  # trained numbers that all layers share
    "tinylora": {},
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_adapters_that_say_so_train_alike_on_two_ranks(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    rows = chats(9)

    def order(name: str, strategy: str) -> RunOrder:
        entry = catalogue.find("adapters", name)
        config = {**CONFIG, "max_steps": 2, "learning_rate": 1e-3}
        use = Use(type=name, config=entry.Config(**SAMPLE[name]).model_dump(mode="json"))
        return make_order(rows, config=config, adapter=use, **compute(strategy))  # type: ignore[no-any-return]

    singles = {n: alone(order(n, "single"), tmp_path / f"one-{n}") for n in SAMPLE}
    divided = on_two_ranks({name: order(name, "fsdp") for name in SAMPLE}, tmp_path)
    export = "checkpoints/step-00000002/export/adapter_model.safetensors"
    for name in SAMPLE:
        strategies = catalogue.find("adapters", name).strategies
        assert strategies is None or "fsdp" in strategies
        close(divided[name], singles[name])
        one, other = (load_file(tmp_path / run / export) for run in (f"one-{name}", name))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], atol=1e-5, rtol=1e-3)


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
    plain = torch.nn.Linear(2, 2)
    for model, given, words in (
        (mixed, settings(), "several"),
        (plain, settings(hook=StepHook()), "each step's gradients"),
    ):
        with pytest.raises(NotSupported, match=words):
            engine_for("fsdp").prepare(model, given)


def test_blocks_are_what_the_model_repeats_and_share_nothing_that_is_divided(lab: Any) -> None:
    base = lab.lora().get_base_model()
    layers = base.model.layers
    assert blocks(base) == list(layers)
    assert kept_whole(base) == set()

    linear = layers[0].mlp.up_proj.base_layer
    layers[1].mlp.up_proj.base_layer.weight = linear.weight
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    base.scale = torch.nn.Parameter(torch.ones(()))
    shared = {linear.weight, base.scale, *layers[0].mlp.down_proj.parameters()}
    assert kept_whole(base) == shared


def test_what_blocks_share_cannot_wait_on_the_host(lab: Any) -> None:
    model = lab.llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(NotSupported, match="what blocks of this adapter share"):
        engine_for("fsdp", "parameters").prepare(model, settings())


def test_a_state_of_other_parameters_is_refused() -> None:
    engine: Any = engine_for("fsdp")
    engine._trained = {"a": torch.zeros(2)}
    good = {f"a.{part}": torch.zeros(2) for part in ("value", "exp_avg", "exp_avg_sq")}
    engine._check(good)
    with pytest.raises(CheckpointCorrupt, match="not those of this run"):
        engine._check({**good, "a.value": torch.zeros(3)})
