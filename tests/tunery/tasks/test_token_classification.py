"""Tags: which token bears a word's, the loss of transformers, windows, entities, heads saved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForTokenClassification

from tunery.errors import InvalidConfig, InvalidData
from tunery.training.types import IGNORE, Evaluated, Outcome

if TYPE_CHECKING:
    from pathlib import Path

LABELS = ("B-LOC", "B-PER", "I-PER", "O")
ROWS = [
    {"tokens": ["Ada", "L", "lives", "in", "Rome"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]},
    {"tokens": ["the", "Nile"], "tags": ["O", "B-LOC"]},
]


def tags_of(example: Any, tokenizer: Any) -> list[tuple[str, int]]:
    document = example.documents[0]
    tokens = tokenizer.convert_ids_to_tokens(document.input_ids.tolist())
    return list(zip(tokens, document.tags.tolist(), strict=True))


def test_the_first_token_of_a_word_bears_its_tag(bench: Any, tokenizer: Any) -> None:
    (example,) = bench("token-classification").encode(ROWS[:1], LABELS)
    assert tags_of(example, tokenizer) == [
        ("[CLS]", IGNORE),
        ("A", 1),
        ("##d", IGNORE),
        ("##a", IGNORE),
        ("L", 2),
        ("lives", 3),
        ("in", 3),
        ("R", 0),
        ("##o", IGNORE),
        ("##m", IGNORE),
        ("##e", IGNORE),
        ("[SEP]", IGNORE),
    ]
    assert example.documents[0].supervised == 5


def test_all_tokens_can_bear_it_and_go_on_inside(bench: Any, tokenizer: Any) -> None:
    task = bench("token-classification", label_all_tokens=True)
    (example,) = task.encode(ROWS[:1], LABELS)
    tagged = [tag for token, tag in tags_of(example, tokenizer)]
    # B-LOC has no I-LOC to go on with.
    assert tagged == [IGNORE, 1, 2, 2, 2, 3, 3, 0, 0, 0, 0, IGNORE]


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_the_loss_is_that_of_transformers(bench: Any, bases: Any, family: str) -> None:
    task = bench("token-classification")
    model = task.load(bases[family], LABELS)
    examples = task.encode(ROWS, LABELS)
    batch = task.collate(examples)
    with torch.no_grad():
        ours = task.loss(model, examples)
        theirs = model(**batch.inputs(), labels=batch.tags)
        alone = sum(task.loss(model, [example]).loss for example in examples)
    units = sum(task.runtime.units(example) for example in examples)
    assert units == 7
    assert float(ours.loss) / units == pytest.approx(float(theirs.loss), abs=1e-5)
    assert float(ours.loss) == pytest.approx(float(alone), abs=1e-4)


def test_what_is_too_long_goes_on_in_another_window(bench: Any) -> None:
    task = bench("token-classification")
    examples = task.encode([ROWS[1], ROWS[0]], LABELS, max_length=8)
    assert [example.index for example in examples] == [0, 1, 1]
    assert all(example.documents[0].input_ids[0] == 1 for example in examples)
    words = [example.arrays["words"].tolist() for example in examples]
    assert words == [[[1, 3], [2, 0]], [[1, 1], [4, 2], [5, 3], [6, 3]], [[1, 0]]]


def outcome(example: Any, said: list[int]) -> Outcome:
    return Outcome(example, {"tags": np.array(said)})


def test_metrics_and_predictions_by_hand(bench: Any) -> None:
    task = bench("token-classification")
    first, long, rest = task.encode([ROWS[1], ROWS[0]], LABELS, max_length=8)
    seen = Evaluated(
        0.5,
        outcomes=[
            outcome(first, [9, 3, 0, 9]),
            outcome(long, [9, 1, 9, 9, 3, 3, 3, 9]),
            outcome(rest, [9, 0, 9, 9]),
        ],
        labels=LABELS,
    )
    values = task.runtime.metrics(["loss", "entity_f1", "entity_precision", "accuracy"], seen)
    assert values == {
        "loss": 0.5,
        "entity_f1": pytest.approx(2 / 3),  # two places found; the person is cut short
        "entity_precision": pytest.approx(2 / 3),
        "accuracy": pytest.approx(6 / 7),
    }
    assert list(task.runtime.predictions(seen)) == [
        {"row": 0, "prediction": ["O", "B-LOC"], "label": ["O", "B-LOC"]},
        {"row": 1, "prediction": ["B-PER", "O", "O", "O", "B-LOC"], "label": ROWS[0]["tags"]},
    ]


def test_a_word_without_tokens_is_outside(bench: Any) -> None:
    task = bench("token-classification")
    (example,) = task.encode(
        [{"tokens": ["Ada", "\u200b\u0001"], "tags": ["B-PER", "B-LOC"]}], LABELS
    )
    assert example.arrays["words"].tolist()[0] == [1, 1]
    seen = Evaluated(0.0, outcomes=[outcome(example, [1] * 20)], labels=LABELS)
    (row,) = task.runtime.predictions(seen)
    assert len(row["prediction"]) == 2


def test_training_learns_the_tags_and_peft_loads_them(
    bench: Any, bases: Any, tmp_path: Path
) -> None:
    task = bench("token-classification")
    model = task.adapt(task.load(bases["bert"], LABELS), "lora")
    examples = task.encode(ROWS, LABELS)
    out = task.learn(model, examples, rate=1e-2)
    tags = task.collate(examples).tags
    assert torch.equal(out.outcomes["tags"][tags != IGNORE], tags[tags != IGNORE])
    task.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS"
    assert "classifier" in config["modules_to_save"]
    about = AutoConfig.from_pretrained(tmp_path)
    assert about.id2label == dict(enumerate(LABELS))
    base = AutoModelForTokenClassification.from_pretrained(bases["bert"], config=about)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = task.collate(examples).inputs()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("adapter", ["prompt", "prefix"])
def test_positions_of_a_soft_prompt_bear_no_tags(bench: Any, bases: Any, adapter: str) -> None:
    task = bench("token-classification")
    model = task.adapt(task.load(bases["bert"], LABELS), adapter).eval()
    with torch.no_grad():
        out = task.loss(model, task.encode(ROWS, LABELS))
    assert out.loss.isfinite()
    assert out.outcomes["tags"].shape == (2, 12)


def test_labels_are_in_the_config(bench: Any, bases: Any) -> None:
    model = bench("token-classification").load(bases["bert"], LABELS)
    assert model.config.id2label == dict(enumerate(LABELS))


def test_refusals(bench: Any, bases: Any) -> None:
    task = bench("token-classification")
    with pytest.raises(InvalidConfig, match="two labels or more"):
        task.load(bases["bert"], ("O",))
    with pytest.raises(InvalidData, match="row 0: a tag is none of the 4") as caught:
        task.encode([{"tokens": ["x"], "tags": ["B-SECRET"]}], LABELS)
    assert caught.value.code == "unknown_label"
