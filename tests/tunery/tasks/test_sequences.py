"""Pairs, several labels, numbers: the losses of transformers, metrics and predictions by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from tunery.errors import InvalidConfig, InvalidData
from tunery.training.types import Evaluated, Outcome

if TYPE_CHECKING:
    from pathlib import Path

LABELS = ("hard", "soft", "wet")
ROWS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [
        {"text": "a good stone", "text_pair": "bad", "label": "hard"},
        {"text": "who", "label": "soft"},
        {"text": "where", "text_pair": "in the sea of stones", "label": "wet"},
    ],
    "multi-label-classification": [
        {"text": "a good stone", "labels": ["hard"]},
        {"text": "who", "text_pair": "is in the sea", "labels": ["soft", "wet"]},
        {"text": "where", "labels": []},
    ],
    "text-regression": [
        {"text": "a good stone", "text_pair": "the bad stone", "target": 4.0},
        {"text": "who", "target": 0.5},
        {"text": "where is the sea", "target": 2.0},
    ],
}
TARGETS = {
    "text-classification": [0, 1, 2],
    "multi-label-classification": [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]],
    "text-regression": [4.0, 0.5, 2.0],
}


def labels_of(name: str) -> tuple[str, ...] | None:
    return None if name == "text-regression" else LABELS


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("name", ROWS)
def test_the_loss_is_that_of_transformers(bench: Any, bases: Any, name: str, family: str) -> None:
    task = bench(name)
    model = task.load(bases[family], labels_of(name))
    model.config.pad_token_id = 0  # by which transformers looks for a decoder's last token
    examples = task.encode(ROWS[name], labels_of(name))
    batch = task.collate(examples)
    inputs = batch.inputs()
    if family == "llama":
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        ours = task.loss(model, examples)
        theirs = model(**inputs, labels=batch.targets)
        alone = sum(task.loss(model, [example]).loss for example in examples)
    assert batch.targets.tolist() == TARGETS[name]
    assert float(ours.loss) / 3 == pytest.approx(float(theirs.loss), abs=1e-5)
    assert float(ours.loss) == pytest.approx(float(alone), abs=1e-4)


def test_the_second_text_has_types_of_its_own(bench: Any, tokenizer: Any) -> None:
    first, second, _ = bench("text-classification").encode(ROWS["text-classification"], LABELS)
    assert tokenizer.decode(first.documents[0].input_ids).endswith("[SEP] bad [SEP]")
    assert first.documents[0].tracks["token_type_ids"].tolist()[-3:] == [0, 1, 1]
    assert second.documents[0].tracks == {}


def test_of_a_pair_the_longer_text_is_cut(bench: Any, tokenizer: Any) -> None:
    row = {"text": "good", "text_pair": "bad " * 20, "label": "hard"}
    (example,) = bench("text-classification").encode([row], LABELS, max_length=8)
    said = tokenizer.decode(example.documents[0].input_ids)
    assert said == "[CLS] good [SEP] bad bad bad bad [SEP]"


def outcomes(examples: list[Any], name: str, values: Any) -> list[Outcome]:
    return [
        Outcome(example, {name: np.asarray(value, dtype=np.float32)})
        for example, value in zip(examples, values, strict=True)
    ]


def test_label_sets_by_hand(bench: Any) -> None:
    name = "multi-label-classification"
    task = bench(name, threshold=0.4)
    shares = [[0.9, 0.45, 0.0], [0.1, 0.8, 0.3], [0.1, 0.1, 0.1]]
    kept = outcomes(task.encode(ROWS[name], LABELS), "probabilities", shares)
    seen = Evaluated(0.5, outcomes=kept, labels=LABELS)
    assert task.runtime.metrics(["loss", "micro_f1", "macro_f1", "subset_accuracy"], seen) == {
        "loss": 0.5,
        "micro_f1": pytest.approx(2 * 2 / (3 + 3)),
        "macro_f1": pytest.approx((1 + 2 / 3 + 0) / 3),
        "subset_accuracy": pytest.approx(1 / 3),
    }
    rows = list(task.runtime.predictions(seen))
    assert rows[1] == {
        "row": 1,
        "prediction": ["soft"],
        "label": ["soft", "wet"],
        "probabilities": {"hard": 0.1, "soft": 0.8, "wet": 0.3},
    }
    json.dumps(rows)


def test_numbers_by_hand(bench: Any) -> None:
    task = bench("text-regression")
    kept = outcomes(task.encode(ROWS["text-regression"]), "said", [3.0, 1.5, 2.0])
    seen = Evaluated(2 / 3, outcomes=kept)
    values = task.runtime.metrics(["mse", "rmse", "mae", "pearson", "spearman"], seen)
    assert values == {
        "mse": pytest.approx(2 / 3),
        "rmse": pytest.approx((2 / 3) ** 0.5),
        "mae": pytest.approx(2 / 3),
        "pearson": pytest.approx(0.9942, abs=1e-4),
        "spearman": pytest.approx(1.0),
    }
    assert next(iter(task.runtime.predictions(seen))) == {"row": 0, "prediction": 3.0, "label": 4.0}


def test_similarity_rows_are_pairs_with_a_number(bench: Any, tokenizer: Any) -> None:
    row = {"sentence1": "who", "sentence2": "where", "score": 2.5}
    (example,) = bench("text-regression").encode([row], format="similarity")
    assert tokenizer.decode(example.documents[0].input_ids) == "[CLS] who [SEP] where [SEP]"
    assert float(example.target) == 2.5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("multi-label-classification", "multi_label_classification"),
        ("text-regression", "regression"),
    ],
)
def test_training_learns_and_peft_loads_the_result(
    bench: Any, bases: Any, tmp_path: Path, name: str, problem: str
) -> None:
    task = bench(name)
    model = task.adapt(task.load(bases["bert"], labels_of(name)), "lora")
    examples = task.encode(ROWS[name], labels_of(name))
    with torch.no_grad():
        before = float(task.loss(model.eval(), examples).loss)
    after = float(task.learn(model, examples, rate=1e-2).loss)
    assert after < before / 4
    about = AutoConfig.from_pretrained(task.export(model, tmp_path))
    assert about.problem_type == problem
    base = AutoModelForSequenceClassification.from_pretrained(bases["bert"], config=about)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = task.collate(examples).inputs()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_refusals(bench: Any, bases: Any) -> None:
    task = bench("multi-label-classification")
    with pytest.raises(InvalidConfig, match="two labels or more"):
        task.load(bases["bert"], ("one",))
    with pytest.raises(InvalidData, match="row 0: its label is none"):
        task.encode([{"text": "who", "labels": ["secret"]}], LABELS)
