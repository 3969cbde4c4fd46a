"""Every task through a whole request: resolved, trained, stopped, resumed, exported, loaded again.

A new task needs rows here, and nothing else.
"""

from __future__ import annotations

import base64
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft import PeftModel

from tests.tunery.tasks.media import square, tone
from tunery import catalogue
from tunery.cli.local_data import describe
from tunery.data import formats
from tunery.data.formats import Format
from tunery.errors import UnsupportedCombination
from tunery.request import parse_request
from tunery.resolve import resolve
from tunery.spec import DataFile
from tunery.training import program
from tunery.training.card import AUTO_CLASS
from tunery.training.control import StopFlag
from tunery.training.losses import TokenLossComputer
from tunery.training.preview import transformed
from tunery.training.program import load_tokenizer
from tunery.training.protocol import EXIT_DONE, EXIT_STOPPED, RunOrder
from tunery.training.types import EncodeOptions, MethodRun, Prepares, examples_of

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["good", "bad", "sea", "the good sea", "a bad dog", "Rome", "who lives in Rome", "where"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text-generation": [{"prompt": f"who is {w}", "completion": w} for w in WORDS],
    "text-classification": [
        {"text": w, "text_pair": "is it", "label": "bad" if "bad" in w else "good"} for w in WORDS
    ],
    "multi-label-classification": [
        {"text": w, "labels": [n for n in ("bad", "sea", "o") if n in w]} for w in WORDS
    ],
    "text-regression": [{"text": w, "target": len(w) / 10} for w in WORDS],
    "token-classification": [
        {"tokens": w.split(), "tags": ["B-X" if t[0] in "sR" else "O" for t in w.split()]}
        for w in WORDS
    ],
    "question-answering": [
        {
            "question": "what is it",
            "context": f"it is {w} in the end",
            "answers": [{"text": w, "answer_start": 6}],
        }
        for w in WORDS
    ],
    "sequence-to-sequence": [{"source": w, "target": w[::-1]} for w in WORDS],
    "reward-modeling": [{"prompt": "who", "chosen": w, "rejected": w + " bad"} for w in WORDS],
    "sentence-embedding": [{"anchor": f"who is {w}", "positive": w} for w in WORDS],
}
for kind, column, files in (
    ("audio", "audio", [tone(200 * (i + 1), 0.1) for i in range(8)]),
    ("image", "image", [square(30 * i) for i in range(8)]),
):
    ROWS[f"{kind}-classification"] = [
        {column: base64.b64encode(data).decode(), "label": "high" if i > 3 else "low"}
        for i, data in enumerate(files)
    ]
ROWS["speech-to-text"] = [
    {"audio": base64.b64encode(tone(200 * (i + 1), 0.1)).decode(), "text": w}
    for i, w in enumerate(WORDS)
]
FAMILY = {
    "text-generation": "llama",
    "sequence-to-sequence": "bart",
    "speech-to-text": "whisper",
    "audio-classification": "ast",
    "image-classification": "vit",
}
OTHER_CLASSES = {
    "speech-to-text": "AutoModelForSpeechSeq2Seq",
    "audio-classification": "AutoModelForAudioClassification",
    "image-classification": "AutoModelForImageClassification",
}
METHOD = {"sentence-embedding": "contrastive", "reward-modeling": "reward"}
CHATML = [{"type": "chat_template", "name": "chatml"}]
SETTINGS = {"max_steps": 4, "batch_size": 4, "learning_rate": 5e-3, "max_length": 96}
every_task = pytest.mark.parametrize("name", catalogue.entries("tasks"))


@every_task
def test_the_example_row_is_of_a_format_that_the_task_reads(name: str) -> None:
    entry = catalogue.find("tasks", name)
    found = formats.detect(dict(entry.example_row))
    assert isinstance(found, Format)
    assert found.name in entry.formats
    assert [finding.code for finding in found.check(dict(entry.example_row))] == []


def test_every_task_is_tried() -> None:
    assert catalogue.entries("tasks").keys() == ROWS.keys()


class Request:
    """A create request for a task, as a user sends it, and its runs."""

    def __init__(self, name: str, base: Path, folder: Path, **evaluation: Any) -> None:
        self.name, self.base, self.folder = name, base, folder
        kinds = {"train": ROWS[name], "valid": ROWS[name][:5], "test": ROWS[name][5:]}
        self.paths = [folder / f"{kind}.jsonl" for kind in kinds]
        for path, rows in zip(self.paths, kinds.values(), strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        training, validation, test = (describe(path) for path in self.paths)
        tested = bool(evaluation.get("test_file"))
        method = METHOD.get(name, "supervised")
        body = {
            "model": "example/base",
            "training_file": training.file_id,
            "validation_file": validation.file_id,
            "method": {"type": method, method: {"hyperparameters": SETTINGS}},
            "ext": {
                "task": dict(catalogue.find("tasks", name).example),
                "checkpoints": {"every_steps": 2},
                "evaluation": evaluation,
                **({"transforms": CHATML} if training.format in ("chat", "preference") else {}),
            },
        }
        self.spec = resolve(
            parse_request(body),
            training=training,
            validation=validation,
            test=test if tested else None,
            seed=3,
        ).spec

    def run(self, kind: str, *, stop_after: int | None = None, resume: Path | None = None) -> Any:
        events: list[Any] = []
        stop = StopFlag()

        def hear(event: Any) -> None:
            events.append(event)
            if event.kind == "metrics" and event.step == stop_after:
                stop.request_stop()

        order = RunOrder(
            run="run-1",
            spec=self.spec,
            base_model_path=str(self.base),
            training_path=str(self.paths[0]),
            validation_path=str(self.paths[1]),
            test_path=str(self.paths[2]),
            resume_path=str(resume) if resume else None,
        )
        workdir = self.folder / kind
        workdir.mkdir()
        code = program.run(order, workdir, hear, stop)
        wanted = EXIT_STOPPED if stop_after else EXIT_DONE
        assert code == wanted, [event.message for event in events if event.kind == "failure"]
        return events

    def checkpoint(self, kind: str, step: int, half: str) -> Path:
        return self.folder / kind / "checkpoints" / f"step-{step:08d}" / half

    def loss_of_export(self, export: Path) -> float:
        """Over the validation rows, by what anybody can load from the export."""
        task = catalogue.find("tasks", self.name)
        runtime = task.runtime(task.Config.model_validate(self.spec.task.config))
        runtime.load_model(self.base, dtype=torch.float32, labels=self.spec.data.training.labels)
        known = OTHER_CLASSES.get(self.name) or AUTO_CLASS[str(runtime.peft_task_type)]
        auto = getattr(transformers, known)
        about = {} if self.name == "text-generation" else {"config": _config(export)}
        base = auto.from_pretrained(self.base, **about)
        model = PeftModel.from_pretrained(base, export).eval()
        prepares = isinstance(runtime, Prepares)
        tokenizer = runtime.load_tokenizer(export) if prepares else load_tokenizer(export)
        options = EncodeOptions(
            format=self.spec.data.training.format,
            max_length=SETTINGS["max_length"],
            labels=self.spec.data.training.labels,
        )
        read = formats.find(self.spec.data.training.format).normal
        rows = [read(row) for row in ROWS[self.name][:5]]
        examples = [
            example
            for number, row in enumerate(transformed(rows, self.spec.transforms, tokenizer))
            for example in examples_of(runtime.encode(row, tokenizer, options, number))
        ]
        run = MethodRun(runtime, TokenLossComputer(base), None, 0)
        method = catalogue.find("methods", self.spec.method.type)
        objective = method.objective(method.Config.model_validate(self.spec.method.config), run)
        if hasattr(objective, "begin"):
            objective.begin(examples)
        batch = runtime.collate(examples, layout="rows", pad_id=0)
        with torch.no_grad():
            loss = objective.loss(model, batch).loss
        return float(loss) / sum(objective.units(example) for example in examples)


def _config(export: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(export)


def series(events: list[Any], name: str) -> dict[int, float]:
    return {e.step: e.values[name] for e in events if e.kind == "metrics" and name in e.values}


@every_task
def test_a_request_trains_resumes_and_leaves_what_loads(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    request = Request(name, bases[FAMILY.get(name, "bert")], tmp_path)
    whole = request.run("whole")
    losses = series(whole, "train_loss")
    assert sorted(losses) == [1, 2, 3, 4]
    last = next(event for event in whole if event.kind == "done").metrics
    for metric in catalogue.find("tasks", name).default_metrics:
        reported = {"token_accuracy": "mean_token_accuracy"}.get(metric, metric)
        if name == "sentence-embedding" and metric not in ("loss", "ndcg_at_10"):
            continue  # of scored pairs, and of triplets
        value = last.get(f"valid_{metric}", last.get(f"valid_{reported}"))
        assert value is not None, metric
        assert math.isfinite(value)
    stopped = request.run("stopped", stop_after=1)
    at = max(series(stopped, "train_loss"))
    resumed = request.run("resumed", resume=request.checkpoint("stopped", at, "resume"))
    after = {step: loss for step, loss in losses.items() if step > at}
    assert series(resumed, "train_loss") == pytest.approx(after, abs=1e-6)
    export = request.checkpoint("whole", 4, "export")
    assert request.loss_of_export(export) == pytest.approx(last["valid_loss"], abs=1e-4)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["text-classification", "question-answering"])
def test_base_and_test_file_are_measured_and_answers_are_left(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    request = Request(name, bases["bert"], tmp_path, baseline=True, test_file="test.jsonl")
    events = request.run("whole")
    last = next(event for event in events if event.kind == "done").metrics
    for what in ("valid", "test"):
        assert series(events, f"base_{what}_loss").keys() == {0}
        assert last[f"base_{what}_loss"] > last[f"{what}_loss"]
    assert series(events, "test_loss").keys() == {4}
    # A LoRA adapter starts as the base, so the first measurement is the base's too.
    assert series(events, "valid_loss")[0] == pytest.approx(last["base_valid_loss"], abs=1e-5)
    answers = request.checkpoint("whole", 4, "export") / "predictions"
    assert {path.stem: len(lines(path)) for path in answers.iterdir()} == {
        "valid": 5,
        "test": 3,
        "base_valid": 5,
        "base_test": 3,
    }
    assert [row["row"] for row in lines(answers / "test.jsonl")] == [0, 1, 2]
    assert not (request.checkpoint("whole", 2, "export") / "predictions").exists()


def test_answers_are_left_out_where_that_is_asked(bases: dict[str, Path], tmp_path: Path) -> None:
    request = Request("text-classification", bases["bert"], tmp_path, predictions=False)
    request.run("whole")
    assert not (request.checkpoint("whole", 4, "export") / "predictions").exists()


def test_a_test_file_that_nobody_brings_is_refused() -> None:
    file = DataFile(
        file_id="file-1",
        sha256="0",
        format="classification",
        rows=9,
        size_bytes=9,
        labels=("a", "b"),
    )
    ext = {"evaluation": {"test_file": "file-2"}}
    request = parse_request({"model": "m", "training_file": "file-1", "ext": ext})
    with pytest.raises(UnsupportedCombination) as caught:
        resolve(request, training=file, seed=0)
    assert caught.value.param == "ext.evaluation.test_file"
    other = file.model_copy(update={"format": "chat"})
    with pytest.raises(UnsupportedCombination, match="the test file is chat data"):
        resolve(request, training=file, test=other, seed=0)
    bare = parse_request(
        {"model": "m", "training_file": "f", "ext": {"evaluation": {"baseline": True}}}
    )
    with pytest.raises(UnsupportedCombination, match="there is no held-out file"):
        resolve(bare, training=file, seed=0)
