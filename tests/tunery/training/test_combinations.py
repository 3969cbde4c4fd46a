"""Every adapter with every method and task it fits: trains, resumes to the same losses, exports.

Runs go through the trainer's program, as a worker's do, on tiny random models of both kinds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tunery import catalogue
from tunery.adapters._tuner import Tuner
from tunery.adapters.full import Full
from tunery.entries import Loads
from tunery.spec import (
    BaseModelRef,
    Checkpoints,
    Compute,
    Data,
    DataFile,
    Evaluation,
    TrainingSpec,
    Use,
)
from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_DONE, RunOrder

STEPS = 4
LABELS = ("no", "yes")
SPECIALS = ["<pad>", "<|im_start|>", "<|im_end|>"]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": [_turn("user", f"count {i}"), _turn("assistant", "x" * (i % 5 + 1))]}
        for i in range(10)
    ],
    "preference": [
        {
            "input": {"messages": [_turn("user", f"count {i}")]},
            "preferred_output": [_turn("assistant", "yes" * (i % 3 + 1))],
            "non_preferred_output": [_turn("assistant", "no" * (i % 4 + 1))],
        }
        for i in range(10)
    ],
    "classification": [{"text": "ab" * (i % 4 + 1), "label": LABELS[i % 2]} for i in range(10)],
}
FORMAT = {
    ("text-generation", "supervised"): "chat",
    ("text-generation", "dpo"): "preference",
    ("text-classification", "supervised"): "classification",
}
REFUSED = {("bitfit", "llama")}
"""Llamas have no biases."""
COMMON = ("text-generation", "supervised")


@dataclass(frozen=True)
class Combination:
    adapter: str
    method: str
    task: str
    model: str

    def __str__(self) -> str:
        return f"{self.adapter}-{self.method}-{self.task}-{self.model}"


def _combinations() -> list[Any]:
    """All that the entries themselves say go together.

    PEFT's tuners share their code: each tells enough in one combination, the rest is slow.
    """
    found: list[Any] = []
    for name, adapter in catalogue.entries("adapters").items():
        if isinstance(adapter, Loads):
            continue
        for method_name in catalogue.entries("methods"):
            method = catalogue.find("methods", method_name)
            for task in sorted(method.tasks or catalogue.entries("tasks")):
                fits = adapter.tasks is None or task in adapter.tasks  # type: ignore[attr-defined]
                if not fits or (task, method_name) not in FORMAT:
                    continue
                kinds = ["llama", "bert"] if task == "text-classification" else ["llama"]
                kinds = [kind for kind in kinds if (name, kind) not in REFUSED]
                many = isinstance(adapter, Tuner) and (task, method_name) != COMMON
                marks = [pytest.mark.slow] if many else []
                found += [
                    pytest.param(case, id=str(case), marks=marks)
                    for case in (Combination(name, method_name, task, kind) for kind in kinds)
                ]
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models and data files."""
    root = tmp_path_factory.mktemp("home")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    llama = LlamaConfig(
        **sizes, num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id
    )
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    BertModel(BertConfig(**sizes)).save_pretrained(root / "bert")
    for name in ("llama", "bert"):
        tokenizer.save_pretrained(root / name)
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(lines, "utf-8")
    return root


def order_for(home: Path, case: Combination, resume: Path | None = None) -> RunOrder:
    format = FORMAT[case.task, case.method]
    method = catalogue.find("methods", case.method)
    config = method.Config(max_steps=STEPS, batch_size=4, learning_rate=5e-3, max_length=128)  # type: ignore[call-arg]
    adapter = catalogue.find("adapters", case.adapter)
    example = {key: value for key, value in adapter.example.items() if key != "type"}
    file = DataFile(
        file_id="file-1",
        sha256="0" * 64,
        format=format,  # type: ignore[arg-type]
        rows=10,
        size_bytes=1,
        labels=LABELS if format == "classification" else None,
    )
    chat = format != "classification"
    spec = TrainingSpec(
        model=BaseModelRef(name="example/base"),
        task=Use(type=case.task),
        method=Use(type=case.method, config=config.model_dump(mode="json")),
        adapter=Use(type=case.adapter, config=adapter.Config(**example).model_dump(mode="json")),
        transforms=(Use(type="chat_template", config={"name": "chatml"}),) if chat else (),
        data=Data(training=file, validation=file),
        seed=3,
        compute=Compute(micro_batch_tokens=96),
        checkpoints=Checkpoints(every_steps=2),
        evaluation=Evaluation(metrics=catalogue.find("tasks", case.task).default_metrics),
    )
    path = str(home / f"{format}.jsonl")
    return RunOrder(
        run="run-1",
        spec=spec,
        base_model_path=str(home / case.model),
        training_path=path,
        validation_path=path,
        resume_path=str(resume) if resume else None,
    )


def run(order: RunOrder, workdir: Path) -> list[Any]:
    workdir.mkdir()
    events: list[Any] = []
    code = program.run(order, workdir, events.append, StopFlag())
    assert code == EXIT_DONE, [e.message for e in events if e.kind == "failure"]
    return events


def losses(events: list[Any]) -> dict[int, float]:
    return {
        e.step: e.values["train_loss"]
        for e in events
        if e.kind == "metrics" and "train_loss" in e.values
    }


# PEFT itself writes AdaLoRA's rank pattern by parameter and warns when it reads it.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT, of tuned norms
@pytest.mark.parametrize("case", _combinations())
def test_it_trains_resumes_and_exports(case: Combination, home: Path, tmp_path: Path) -> None:
    whole = run(order_for(home, case), tmp_path / "whole")
    assert sorted(losses(whole)) == [1, 2, 3, 4]
    halfway = tmp_path / "whole" / "checkpoints" / "step-00000002" / "resume"
    resumed = run(order_for(home, case, halfway), tmp_path / "resumed")
    after = {step: loss for step, loss in losses(whole).items() if step > 2}
    assert losses(resumed) == pytest.approx(after, abs=1e-6)
    start = next(e for e in whole if e.kind == "start")
    assert start.features["preflight"]["rows"] == 10
    assert start.trainable_parameters > 0
    _check_export(case, home, tmp_path / "whole" / "checkpoints" / "step-00000004" / "export")


def test_the_spec_alone_decides_how_a_head_starts(home: Path, tmp_path: Path) -> None:
    case = Combination("lora", "supervised", "text-classification", "llama")
    curves = []
    for number in (1, 2):
        torch.manual_seed(number)
        curves.append(losses(run(order_for(home, case), tmp_path / str(number))))
    assert curves[0] == curves[1]


def _check_export(case: Combination, home: Path, export: Path) -> None:
    """Loads without Tunery, and answers other than the base does."""
    classifies = case.task == "text-classification"
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    more = {"num_labels": len(LABELS)} if classifies else {}
    torch.manual_seed(3)
    base = auto.from_pretrained(home / case.model, **more).eval()
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        before = base(ids).logits
        tuned = (
            auto.from_pretrained(export)
            if isinstance(catalogue.find("adapters", case.adapter), Full)
            else PeftModel.from_pretrained(base, export)
        ).eval()
        after = tuned(ids).logits
    assert after.isfinite().all()
    shown = after[:, -ids.shape[1] :] if after.dim() == 3 else after
    assert not torch.allclose(before, shown)
    if classifies:
        labels = AutoConfig.from_pretrained(export).id2label
        assert labels == dict(enumerate(LABELS))
        assert str(home) not in (export / "config.json").read_text()
