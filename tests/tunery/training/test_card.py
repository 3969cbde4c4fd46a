from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import IA3Config, LoraConfig, get_peft_model

from tests.tunery.training.test_program import Told
from tunery.spec import Use
from tunery.training.card import vllm_obstacles
from tunery.training.protocol import EXIT_DONE

LORA = Use(type="lora", config={"r": 4, "lora_alpha": 8})


def card_of(told: Told) -> tuple[dict[str, Any], str, Path]:
    """Front matter, text and folder of the last export."""
    assert told.code == EXIT_DONE
    folder = Path(told.kind("checkpoint")[-1].path) / "export"
    _, head, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), text, folder


def run_its_code(text: str, folder: Path, name: str, base: Path) -> str:
    """The card's own snippet in a fresh process, then the model's class."""
    code = text.split("```python\n")[1].split("```")[0].replace(repr(name), repr(str(base)))
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(type(model).__name__, model.dtype)"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


def test_an_adapters_card_tells_where_it_came_from_and_its_code_runs(
    make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    order = make_order(chats(6), chats(2, seed=1), config={"max_steps": 2}, adapter=LORA)
    head, text, folder = card_of(Told(order, tmp_path / "work"))
    spec = order.spec
    assert head["base_model"] == spec.model.name
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "text-generation")
    assert spec.data.training.sha256 in text
    assert "| adapter.r | `4` |" in text
    assert "valid_loss" in text
    assert "arXiv 2106.09685" in text
    assert run_its_code(text, folder, spec.model.name, base_model) == "PeftModelForCausalLM"


def test_a_full_models_card_loads_it_without_its_base(
    make_order: Any, chats: Any, base_model: Path, tmp_path: Path
) -> None:
    order = make_order(chats(4), config={"max_steps": 1}, adapter=Use(type="full", config={}))
    head, text, folder = card_of(Told(order, tmp_path / "work"))
    assert head["library_name"] == "transformers"
    assert "PeftModel" not in text
    assert run_its_code(text, folder, order.spec.model.name, base_model) == "LlamaForCausalLM"


def test_no_training_text_is_in_the_card(make_order: Any, chats: Any, tmp_path: Path) -> None:
    rows = chats(4)
    _, text, _ = card_of(Told(make_order(rows, config={"max_steps": 1}), tmp_path / "work"))
    contents = [message["content"] for row in rows for message in row["messages"]]
    assert not [content for content in contents if len(content) > 8 and content in text]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, []),
        ({"r": 513}, ["its rank 513 is over 512"]),
        ({"use_dora": True}, ["it uses DoRA"]),
        ({"bias": "lora_only"}, ["it trains biases"]),
        ({"modules_to_save": ["lm_head"]}, ["it saves modules whole"]),
        ({"rank_pattern": {"q_proj": 2}}, ["its ranks differ between modules"]),
        ({"init_lora_weights": "pissa"}, ["its initialisation changed the base's weights"]),
    ],
)
def test_what_vllm_would_not_serve_is_named(
    lab: Any, settings: dict[str, Any], why: list[str]
) -> None:
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    assert vllm_obstacles(get_peft_model(lab.llama(), LoraConfig(**config))) == why


def test_vllm_serves_no_other_tuner_and_any_full_model(lab: Any) -> None:
    tuned = get_peft_model(lab.llama(), IA3Config(task_type="CAUSAL_LM"))
    assert vllm_obstacles(tuned) == ["vLLM serves LoRA adapters; this one is IA3"]
    assert vllm_obstacles(lab.llama()) == []
