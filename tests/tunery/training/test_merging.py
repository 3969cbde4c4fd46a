from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tunery.training.test_program import Told
from tunery.cli.main import run
from tunery.errors import BaseModelUnavailable, CheckpointCorrupt, UnsupportedCombination
from tunery.spec import Output, Use
from tunery.training.merging import merge, read_report
from tunery.training.protocol import EXIT_DONE

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=4, target_modules=["v_proj"], use_rslora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
}


def adapter(base: Path, folder: Path, config: Any, *, spread: float = 0.2) -> Path:
    """An export with weights that do something."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), deepcopy(config))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += spread * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_merged_model_answers_as_base_and_adapter_do(
    base_model: Path, tmp_path: Path, kind: str
) -> None:
    export = adapter(base_model, tmp_path / "export", CONFIGS[kind])
    report = merge(base_model, export, tmp_path / "merged")
    ids = torch.arange(40)[None] % 200
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), export)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=1e-4, rtol=0)
    assert report == read_report(tmp_path / "merged")
    assert report.dtype == "float32"
    assert report.lost < 1e-4
    assert report.same_top == 1.0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) > 0


def test_what_half_precision_loses_is_told(base_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(base_model, half)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.bfloat16)
    model.save_pretrained(half)
    strong = adapter(half, tmp_path / "strong", CONFIGS["lora"])
    faint = adapter(half, tmp_path / "faint", CONFIGS["lora"], spread=1e-3)
    told = merge(half, strong, tmp_path / "merged")
    assert told.dtype == "bfloat16"
    assert load_file(next((tmp_path / "merged").glob("*.safetensors"))).popitem()[1].dtype == (
        torch.bfloat16
    )
    assert 0 < told.lost < 0.1
    assert merge(half, faint, tmp_path / "merged-faint").lost > told.lost


def test_weights_that_are_not_finite_are_refused(base_model: Path, tmp_path: Path) -> None:
    export = adapter(base_model, tmp_path / "export", CONFIGS["lora"])
    path = export / "adapter_model.safetensors"
    state = load_file(path)
    state[next(iter(state))][:] = float("nan")
    save_file(state, path)
    with pytest.raises(CheckpointCorrupt, match="not finite"):
        merge(base_model, export, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused(base_model: Path, tmp_path: Path) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    export = adapter(base_model, tmp_path / "export", prompt)
    with pytest.raises(UnsupportedCombination, match="PROMPT_TUNING"):
        merge(base_model, export, tmp_path / "merged")


def test_a_wrong_base_or_no_adapter_is_named(base_model: Path, lab: Any, tmp_path: Path) -> None:
    export = adapter(base_model, tmp_path / "export", CONFIGS["lora"])
    wider = tmp_path / "wider"
    lab.llama(hidden_size=48).save_pretrained(wider)
    with pytest.raises(CheckpointCorrupt, match="does not fit"):
        merge(wider, export, tmp_path / "merged")
    with pytest.raises(BaseModelUnavailable):
        merge(tmp_path, export, tmp_path / "merged")
    with pytest.raises(CheckpointCorrupt, match="no adapter"):
        merge(base_model, base_model, tmp_path / "merged")


def test_a_run_that_is_told_to_leaves_the_merged_model_beside_its_adapter(
    make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    order = make_order(chats(6), config={"max_steps": 3}, output=Output(merge=True))
    told = Told(order, tmp_path / "work")
    assert told.code == EXIT_DONE
    export = Path(told.kind("checkpoint")[-1].path) / "export"
    merged = AutoModelForCausalLM.from_pretrained(export / "merged")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), export)
    ids = torch.arange(30)[None]
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=1e-4, rtol=0)
    assert "merge_inexact" not in [event.code for event in told.kind("warning")]


def test_a_classifier_keeps_its_labels(make_order: Any, tmp_path: Path, base_model: Path) -> None:
    rows = [{"text": f"row {i}", "label": ["no", "yes"][i % 2]} for i in range(8)]
    order = make_order(rows, format="classification", config={"max_steps": 2})
    labelled = order.spec.data.training.model_copy(update={"labels": ("no", "yes")})
    spec = order.spec.model_copy(
        update={
            "task": Use(type="text-classification"),
            "data": order.spec.data.model_copy(update={"training": labelled}),
            "output": Output(merge=True),
        }
    )
    told = Told(order.model_copy(update={"spec": spec}), tmp_path / "work")
    assert told.code == EXIT_DONE, told.events[-1]
    export = Path(told.kind("checkpoint")[-1].path) / "export"
    assert read_report(export / "merged").lost < 1e-3
    from transformers import AutoModelForSequenceClassification

    merged = AutoModelForSequenceClassification.from_pretrained(export / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}


def test_the_command_makes_one_model_of_an_adapter_and_the_base_that_it_names(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, into = adapter(base_model, tmp_path / "export", CONFIGS["lora"]), tmp_path / "merged"
    capsys.readouterr()
    assert run(("models", "merge", str(export), "--into", str(into), "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["dtype"] == "float32"
    assert "lost to rounding" in err
    assert (into / "model.safetensors").exists()
    assert run(("models", "merge", str(export), "--into", str(into))) == 6
    assert "exists" in capsys.readouterr().err
    assert run(("models", "merge", str(tmp_path), "--into", str(tmp_path / "new"))) == 4
    assert "--base" in capsys.readouterr().err
