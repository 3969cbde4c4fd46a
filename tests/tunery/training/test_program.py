"""A whole run, and a run that was stopped and goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunery.spec import Checkpoints, Compute, Use
from tunery.training import program
from tunery.training.checkpoint import restore_rng, rng_state, write_rng
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RunOrder


class Told:
    """Runs an order in this process and keeps its events."""

    def __init__(self, order: RunOrder, folder: Path, *, stop_after: int | None = None) -> None:
        self.events: list[Any] = []
        self.stop = StopFlag()
        self.stop_after = stop_after
        folder.mkdir(exist_ok=True)
        self.code = program.run(order, folder, self.hear, self.stop)

    def hear(self, event: Any) -> None:
        self.events.append(event)
        step = getattr(event, "step", None)
        if event.kind == "metrics" and step and step == self.stop_after:
            self.stop.request_stop()

    def kind(self, name: str) -> list[Any]:
        return [event for event in self.events if event.kind == name]

    def series(self, name: str) -> dict[int, float]:
        return {e.step: e.values[name] for e in self.kind("metrics") if name in e.values}


def resumed(order: RunOrder, first: Told) -> RunOrder:
    folder = Path(first.kind("checkpoint")[-1].path)
    return order.model_copy(update={"resume_path": str(folder / "resume"), "attempt": 2})


CHATML = Use(type="chat_template", config={"name": "chatml"})
DROPOUT = Use(type="lora", config={"r": 4, "lora_alpha": 8, "lora_dropout": 0.3})


def test_a_run_tells_its_story_and_leaves_an_adapter_that_peft_loads(
    make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    order = make_order(chats(10), chats(4, seed=1), config={"n_epochs": 2})
    told = Told(order, tmp_path / "work")
    assert told.code == EXIT_DONE
    (start,) = told.kind("start")
    assert (start.total_steps, start.start_step, start.examples) == (6, 0, 10)
    assert start.features["label_compaction"] is True
    assert 0 < start.trained_tokens_per_epoch < start.tokens_per_epoch
    losses = told.series("train_loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    held_out = told.series("valid_loss")
    assert list(held_out) == [0, 3, 6]
    assert held_out[6] < held_out[0]
    (done,) = told.kind("done")
    assert told.events[-1] is done
    assert done.trained_tokens == 2 * start.trained_tokens_per_epoch
    (last,) = told.kind("checkpoint")
    assert last.final
    export = Path(last.path) / "export"
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), export)
    expected = load_file(export / "adapter_model.safetensors")
    assert any(float(value.abs().max()) > 0 for key, value in expected.items() if "lora_B" in key)
    config = json.loads((export / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["inference_mode"] is True
    about = json.loads((export / "training.json").read_text())
    assert about["step"] == 6
    assert about["spec_sha256"] == order.spec.sha256()
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template
    assert loss_of(tuned, tokenizer, chats(4, seed=1)) == pytest.approx(held_out[6], abs=1e-4)


def loss_of(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Held-out loss by transformers' own means: rendered by hand, replies alone."""
    total, count = 0.0, 0
    for row in rows:
        user, assistant = (message["content"] for message in row["messages"])
        prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        ids = [tokenizer(part)["input_ids"] for part in (prompt, assistant + "<|im_end|>")]
        labels = [-100] * len(ids[0]) + ids[1]
        given = torch.tensor([ids[0] + ids[1]])
        with torch.no_grad():
            loss = model(input_ids=given, labels=torch.tensor([labels])).loss
        total += float(loss) * len(ids[1])
        count += len(ids[1])
    return total / count


@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_a_resumed_run_has_the_curve_of_the_uninterrupted_one(
    make_order: Any, chats: Any, tmp_path: Path, stop_after: int
) -> None:
    order = make_order(
        chats(10), chats(4, seed=1), config={"n_epochs": 3, "logging_steps": 1}, adapter=DROPOUT
    )
    whole = Told(order, tmp_path / "whole")
    first = Told(order, tmp_path / "first", stop_after=stop_after)
    assert first.code == EXIT_STOPPED
    (saved,) = first.kind("checkpoint")
    assert saved.step == stop_after + 1
    assert set(saved.kinds) == {"export", "resume"}
    second = Told(resumed(order, first), tmp_path / "second")
    assert second.code == EXIT_DONE
    assert second.kind("start")[0].start_step == stop_after + 1
    for name in ("train_loss", "valid_loss", "grad_norm", "learning_rate"):
        both = first.series(name) | second.series(name)
        assert both == pytest.approx(whole.series(name), abs=1e-6), name
    counts = {e.step: e.trained_tokens for e in whole.kind("metrics")}
    assert {e.step: e.trained_tokens for e in second.kind("metrics")}.items() <= counts.items()
    a, b = (
        load_file(Path(t.kind("checkpoint")[-1].path) / "export" / "adapter_model.safetensors")
        for t in (whole, second)
    )
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6)


def test_dropout_is_at_work_in_the_resume_test(make_order: Any, chats: Any, tmp_path: Path) -> None:
    plain = Told(make_order(chats(10), config={"max_steps": 4}), tmp_path / "plain")
    order = make_order(chats(10), config={"max_steps": 4}, adapter=DROPOUT)
    dropped = Told(order, tmp_path / "dropped")
    assert plain.series("train_loss")[4] != pytest.approx(dropped.series("train_loss")[4], abs=1e-6)


def test_a_checkpoint_between_metric_points_loses_no_sum(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    config = {"max_steps": 8, "logging_steps": 4}
    order = make_order(chats(10), config=config, checkpoints=Checkpoints(every_steps=3))
    whole = Told(order, tmp_path / "whole")
    early = Path(whole.kind("checkpoint")[0].path)
    assert early.name == "step-00000003"
    again = order.model_copy(update={"resume_path": str(early / "resume")})
    second = Told(again, tmp_path / "second")
    assert second.series("train_loss") == pytest.approx(whole.series("train_loss"), abs=1e-6)
    assert list(second.series("train_loss")) == [4, 8]


def test_a_resume_checkpoint_holds_no_pickles(make_order: Any, chats: Any, tmp_path: Path) -> None:
    told = Told(make_order(chats(10), config={"max_steps": 1}), tmp_path / "work")
    names = {p.name for p in Path(told.kind("checkpoint")[0].path).rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".jinja", ".md"}
    assert not list((tmp_path / "work" / "checkpoints").glob(".*"))


def test_a_checkpoint_of_another_run_is_refused(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    first = Told(make_order(chats(10), config={"max_steps": 1}), tmp_path / "first")
    other = make_order(chats(10), config={"max_steps": 2, "learning_rate": 1e-3})
    second = Told(resumed(other, first), tmp_path / "second")
    assert second.code == EXIT_FAILED
    assert second.events[-1].code == "checkpoint_corrupt"


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "rng-rank0.json"])
def test_a_torn_checkpoint_is_refused_by_name(
    make_order: Any, chats: Any, tmp_path: Path, name: str
) -> None:
    order = make_order(chats(10), config={"max_steps": 2}, checkpoints=Checkpoints(every_steps=1))
    first = Told(order, tmp_path / "first")
    torn = Path(first.kind("checkpoint")[0].path) / "resume" / name
    torn.write_bytes(torn.read_bytes()[:40])
    second = Told(order.model_copy(update={"resume_path": str(torn.parent)}), tmp_path / "second")
    assert second.code == EXIT_FAILED
    assert second.events[-1].code == "checkpoint_corrupt"


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_can_start_from_an_export(
    make_order: Any, chats: Any, tmp_path: Path, adapter: str
) -> None:
    order = make_order(
        chats(10), chats(4, seed=1), config={"n_epochs": 2}, adapter=Use(type=adapter)
    )
    first = Told(order, tmp_path / "first")
    export = Path(first.kind("checkpoint")[-1].path) / "export"
    second = Told(order.model_copy(update={"init_path": str(export)}), tmp_path / "second")
    ended = first.series("valid_loss")
    assert second.series("valid_loss")[0] == pytest.approx(ended[max(ended)], abs=1e-5)
    assert ended[max(ended)] < ended[0]


def test_a_fully_tuned_model_loads_as_a_model(make_order: Any, chats: Any, tmp_path: Path) -> None:
    rows = chats(4, seed=1)
    order = make_order(chats(10), rows, config={"n_epochs": 2}, adapter=Use(type="full"))
    told = Told(order, tmp_path / "work")
    export = Path(told.kind("checkpoint")[-1].path) / "export"
    model = AutoModelForCausalLM.from_pretrained(export)
    held_out = told.series("valid_loss")
    loss = loss_of(model, AutoTokenizer.from_pretrained(export), rows)
    assert loss == pytest.approx(held_out[max(held_out)], abs=1e-4)


@pytest.mark.parametrize(
    "without",
    [
        "length_split",
        "label_compaction",
        "chunked_head",
        "deferred_metrics",
        "flat_optimizer",
        "frozen_prefix",
        "token_cache",
        "async_checkpoints",
    ],
)
def test_a_switch_in_the_spec_reaches_the_run_and_changes_no_loss(
    make_order: Any, chats: Any, tmp_path: Path, without: str
) -> None:
    kept = {"cache_dir": str(tmp_path / "cache")}
    plain = Told(make_order(chats(10), config={"max_steps": 3}, order=kept), tmp_path / "plain")
    compute = Compute(without=(without,))
    order = make_order(chats(10), config={"max_steps": 3}, compute=compute, order=kept)
    other = Told(order, tmp_path / "other")
    assert plain.kind("start")[0].features[without] is True
    assert other.kind("start")[0].features[without] is False
    assert other.series("train_loss") == pytest.approx(plain.series("train_loss"), abs=1e-5)


def test_gradient_checkpointing_changes_no_loss(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    plain = Told(make_order(chats(10), config={"max_steps": 3}), tmp_path / "plain")
    order = make_order(
        chats(10), config={"max_steps": 3}, compute=Compute(gradient_checkpointing=True)
    )
    again = Told(order, tmp_path / "again")
    assert again.series("train_loss") == pytest.approx(plain.series("train_loss"), abs=1e-5)
    assert again.kind("start")[0].features["gradient_checkpointing"] is True


def test_validation_rows_that_are_trained_on_are_counted_once(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    def pair(word: str) -> dict[str, Any]:
        turns = (("user", word), ("assistant", "yes"))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    rows = [pair(f"number {i}") for i in range(8)]
    order = make_order(
        rows, [rows[5], pair("new"), {**rows[2], "tools": None}], config={"max_steps": 2}
    )
    told = Told(order, tmp_path / "first", stop_after=1)
    (warning,) = [w for w in told.kind("warning") if w.code == "train_valid_overlap"]
    assert warning.data["rows"] == 2
    assert warning.data["first_lines"] == [1, 3]
    assert "2 of 3 validation rows" in warning.message
    again = Told(resumed(order, told), tmp_path / "second")
    assert again.code == EXIT_DONE
    assert again.kind("warning") == []
    apart = Told(make_order(rows, [pair("new")], config={"max_steps": 1}), tmp_path / "apart")
    assert [w for w in apart.kind("warning") if w.code == "train_valid_overlap"] == []


def test_tokens_are_cached_and_found_again(make_order: Any, chats: Any, tmp_path: Path) -> None:
    kept = {"cache_dir": str(tmp_path / "cache")}
    order = make_order(chats(10), config={"max_steps": 2}, order=kept)
    first = Told(order, tmp_path / "first")
    Path(order.training_path).unlink()
    second = Told(order, tmp_path / "second")
    assert second.code == EXIT_DONE
    assert second.series("train_loss") == first.series("train_loss")


def test_whatever_decides_the_tokens_asks_for_tokens_of_its_own(
    make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    rows = chats(6)
    other = tmp_path / "other-base"
    shutil.copytree(base_model, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("assistant\n", "assistant: "))

    def run(name: str, *args: Any, config: dict[str, Any] | None = None, **spec: Any) -> None:
        settings = {"max_steps": 1, **(config or {})}
        order = make_order(rows, *args, config=settings, order={"cache_dir": str(cache)}, **spec)
        assert Told(order, tmp_path / name).code == EXIT_DONE

    run("plain")
    for count, (name, args, spec) in enumerate(
        [
            ("length", (), {"config": {"max_length": 40}}),
            ("all", (), {"config": {"train_on": "all"}}),
            ("template", (), {"transforms": (CHATML,)}),
            ("tokenizer", (), {"base": other}),
            ("held-out", (rows,), {}),
        ],
        start=2,
    ):
        run(name, *args, **spec)
        assert len(list(cache.iterdir())) == count, name


def test_another_prompt_asks_for_tokens_of_its_own(make_order: Any, tmp_path: Path) -> None:
    rows = [{"text": "ab" * i, "label": "yes"} for i in range(1, 5)]
    for count, prompt in enumerate(("Say {{ text }}:", "Tell {{ text }}:"), start=1):
        template = Use(
            type="prompt_template", config={"prompt": prompt, "completion": " {{ label_word }}"}
        )
        order = make_order(
            rows,
            format="classification",
            config={"max_steps": 1},
            transforms=(template,),
            order={"cache_dir": str(tmp_path / "cache")},
        )
        assert Told(order, tmp_path / f"work-{count}").code == EXIT_DONE
        assert len(list((tmp_path / "cache").iterdir())) == count


def test_transforms_reach_the_validation_rows_too(make_order: Any, tmp_path: Path) -> None:
    """The same four rows in both files: the first step's loss is the held-out loss before it."""
    rows = [{"text": "ab" * i, "label": "yes"} for i in range(1, 5)]
    template = Use(
        type="prompt_template",
        config={"prompt": "Say {{ text }}:", "completion": " {{ label_word }}"},
    )
    order = make_order(
        rows, rows, format="classification", config={"max_steps": 1}, transforms=(template,)
    )
    told = Told(order, tmp_path / "work")
    assert told.code == EXIT_DONE
    before, learnt = told.series("valid_loss")[0], told.series("train_loss")[1]
    assert before == pytest.approx(learnt, abs=1e-5)


def test_generators_go_on_where_the_checkpoint_left_them(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    write_rng(rng_state(), tmp_path, 0)
    expected = draws()
    assert draws() != expected
    restore_rng(tmp_path, 0)
    assert draws() == expected
    restore_rng(tmp_path, 1)  # a rank that the checkpoint did not have


def test_half_precision_trains_through_float32_masters(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    config = {"max_steps": 4}
    compute = Compute(precision="bf16")
    told = Told(make_order(chats(10), config=config, compute=compute), tmp_path / "half")
    full = Told(make_order(chats(10), config=config), tmp_path / "full")
    assert told.code == EXIT_DONE
    assert told.kind("start")[0].features["half_adapters"] is True
    assert told.series("train_loss") == pytest.approx(full.series("train_loss"), rel=2e-2)
    state = load_file(Path(told.kind("checkpoint")[-1].path) / "resume" / "optimizer.safetensors")
    masters = [value for key, value in state.items() if key.endswith(".value")]
    assert all(value.dtype == torch.float32 for value in masters)
    assert any((value != value.bfloat16().float()).any() for value in masters)


def test_adapters_kept_in_float32_lose_as_much(make_order: Any, chats: Any, tmp_path: Path) -> None:
    def told(name: str, **compute: Any) -> Told:
        compute = {"precision": "bf16", **compute}
        order = make_order(chats(10), config={"max_steps": 4}, compute=Compute(**compute))
        return Told(order, tmp_path / name)

    half, whole = told("half"), told("whole", without=("half_adapters",))
    assert whole.kind("start")[0].features["half_adapters"] is False
    # bfloat16 has 8 bits: 0.4 % of each number, averaged over the tokens of a batch.
    assert whole.series("train_loss") == pytest.approx(half.series("train_loss"), rel=5e-3)


# Failures


@pytest.mark.parametrize(
    ("rows", "code", "category"),
    [
        ([{"messages": [{"role": "user", "content": "secret"}]}], "invalid_training_file", None),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "secret"},
                        {"role": "assistant", "content": "secret", "weight": 0},
                    ]
                }
            ],
            "no_trainable_tokens",
            "user_data",
        ),
    ],
)
def test_data_that_teaches_nothing_is_refused_and_not_quoted(
    make_order: Any, tmp_path: Path, rows: Any, code: str, category: str | None
) -> None:
    told = Told(make_order(rows), tmp_path / "work")
    assert told.code == EXIT_FAILED
    failed = told.events[-1]
    assert failed.kind == "failure"
    assert failed.category == (category or "user_data")
    assert category is None or failed.code == code
    assert failed.retryable is False
    assert all("secret" not in event.model_dump_json() for event in told.events)


def test_a_missing_base_model_is_named(make_order: Any, chats: Any, tmp_path: Path) -> None:
    told = Told(make_order(chats(4), base=tmp_path / "nowhere"), tmp_path / "work")
    assert told.code == EXIT_FAILED
    assert told.events[-1].code == "base_model_unavailable"


def test_an_unknown_failure_says_its_class_and_nothing_else(
    make_order: Any, chats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any) -> Any:
        raise ValueError("the row said: secret")

    monkeypatch.setattr(program.Trainer, "_layout", broken)
    told = Told(make_order(chats(4)), tmp_path / "work")
    failed = told.events[-1]
    assert (failed.code, failed.category) == ("internal_error", "unknown")
    assert "ValueError" in failed.message
    assert "secret" not in failed.model_dump_json()


def test_divergence_is_a_named_failure(
    make_order: Any, chats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunery.training.losses import TokenLossComputer

    def poisoned(self: Any, model: Any, batch: Any, **how: Any) -> Any:
        losses = whole(self, model, batch, **how)
        losses.nll = losses.nll * float("nan")
        return losses

    whole = TokenLossComputer.__call__
    monkeypatch.setattr(TokenLossComputer, "__call__", poisoned)
    told = Told(make_order(chats(10)), tmp_path / "work")
    assert told.code == EXIT_FAILED
    failed = told.events[-1]
    assert (failed.code, failed.category, failed.step) == ("non_finite_loss", "user_config", 1)
    assert not told.kind("checkpoint")


def test_a_run_that_starts_with_an_earlier_ones_optimizer_goes_on_as_that_would_have(
    make_order: Any, chats: Any, tmp_path: Path
) -> None:
    # Every batch holds all rows, so that only weights and optimizer tell the runs apart.
    config = {"max_steps": 6, "batch_size": 10, "lr_scheduler_type": "constant"}
    whole = Told(make_order(chats(10), config=config), tmp_path / "whole").series("train_loss")
    first = Told(make_order(chats(10), config=config | {"max_steps": 3}), tmp_path / "first")
    folder = Path(first.kind("checkpoint")[-1].path)
    paths = {"init_path": str(folder / "export"), "init_resume_path": str(folder / "resume")}
    rest = config | {"max_steps": 3}
    warm_order = make_order(chats(10), config=rest, order=paths, checkpoints=Checkpoints())
    warm = Told(warm_order, tmp_path / "warm", stop_after=2)
    assert warm.kind("start")[0].start_step == 0
    losses = warm.series("train_loss") | Told(resumed(warm_order, warm), tmp_path / "on").series(
        "train_loss"
    )
    assert list(losses) == [1, 2, 3]
    assert [losses[i] for i in (1, 2, 3)] == pytest.approx([whole[i] for i in (4, 5, 6)], abs=1e-6)
    del paths["init_resume_path"]
    bare = Told(make_order(chats(10), config=rest, order=paths), tmp_path / "bare")
    assert bare.series("train_loss")[1] == pytest.approx(whole[4], abs=1e-6)
    assert abs(bare.series("train_loss")[3] - whole[6]) > 1e-4
