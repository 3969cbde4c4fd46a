"""Spans: windows and their targets, the loss of transformers, the best span put back into words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForQuestionAnswering

from tunery.errors import InvalidData
from tunery.training.types import Evaluated, Outcome

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = "Ada lives in Rome. Bob is in the sea."
ROWS = [
    {
        "question": "where is Bob",
        "context": CONTEXT,
        "answers": [{"text": "the sea", "answer_start": 29}],
    },
    {
        "question": "who lives in Rome",
        "context": CONTEXT,
        "answers": [{"text": "Ada", "answer_start": 0}],
    },
]
UNANSWERED = {"question": "who is good", "context": "Bob is in the sea.", "answers": []}


def answer_of(example: Any) -> str:
    spans = example.arrays["spans"]
    first, last = example.target.tolist()
    if first == example.arrays["null"]:
        return ""
    context = example.arrays["context"].tobytes().decode()
    return context[spans[first, 0] : spans[last, 1]]


def test_one_window_has_the_answer_whole(bench: Any, tokenizer: Any) -> None:
    examples = bench("question-answering").encode(ROWS)
    assert [answer_of(example) for example in examples] == ["the sea", "Ada"]
    text = tokenizer.decode(examples[0].documents[0].input_ids)
    assert text.startswith("[CLS] where is Bob [SEP] Ada lives")
    assert examples[0].documents[0].tracks["token_type_ids"][-1] == 1


@pytest.mark.parametrize("stride", [0, 4])
def test_windows_overlap_and_keep_the_question(bench: Any, tokenizer: Any, stride: int) -> None:
    task = bench("question-answering", stride=stride)
    examples = task.encode([ROWS[0]], max_length=20)
    assert len(examples) > 1
    texts = [tokenizer.decode(example.documents[0].input_ids) for example in examples]
    assert all(text.startswith("[CLS] where is Bob [SEP]") for text in texts)
    assert {answer_of(example) for example in examples} == {"", "the sea"}
    parts = [example.arrays["context"].tobytes().decode() for example in examples]
    assert parts[0].startswith("Ada")
    assert parts[-1].endswith("sea.")
    tokens = [example.documents[0].input_ids[7:-1].tolist() for example in examples]
    if stride:
        assert tokens[0][-stride:] == tokens[1][:stride]
    else:
        joined = [token for part in tokens for token in part]
        assert joined == tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_the_loss_is_that_of_transformers(bench: Any, bases: Any, family: str) -> None:
    task = bench("question-answering")
    model = task.load(bases[family])
    examples = task.encode([*ROWS, UNANSWERED])
    batch = task.collate(examples)
    inputs = batch.inputs()
    if family == "llama":
        inputs.pop("token_type_ids")
    first, last = batch.targets.unbind(1)
    with torch.no_grad():
        ours = task.loss(model, examples)
        theirs = model(**inputs, start_positions=first, end_positions=last)
    assert float(ours.loss) / 3 == pytest.approx(float(theirs.loss), abs=1e-5)


def outcome(example: Any, first: int, last: int, score: float = 5.0, null: float = 0.0) -> Outcome:
    """As if the model were sure of one span."""
    scores = np.full((2, len(example.documents[0].input_ids) + 3), -9.0, dtype=np.float32)
    scores[0, first] = scores[1, last] = score / 2
    scores[:, int(example.arrays["null"])] = null / 2
    return Outcome(example, {"start": scores[0], "end": scores[1]})


def test_the_best_span_over_all_windows_answers(bench: Any) -> None:
    task = bench("question-answering", stride=0)
    one, two, *rest = task.encode([ROWS[0]], max_length=20)
    first, last = (two if answer_of(two) else rest[0]).target.tolist()
    right = two if answer_of(two) else rest[0]
    seen = Evaluated(1.0, outcomes=[outcome(one, 6, 7, 3.0), outcome(right, first, last, 4.0)])
    values = task.runtime.metrics(["exact_match", "f1", "no_answer_accuracy"], seen)
    assert values == {"exact_match": 1.0, "f1": 1.0}
    assert list(task.runtime.predictions(seen)) == [
        {"row": 0, "prediction": "the sea", "label": ["the sea"]}
    ]


def test_no_answer_is_said_where_it_scores_highest(bench: Any) -> None:
    task = bench("question-answering")
    answered, unanswered = task.encode([ROWS[1], UNANSWERED])
    first, last = answered.target.tolist()
    kept = [outcome(answered, first, last, 5.0, 1.0), outcome(unanswered, 6, 8, 1.0, 5.0)]
    names = ["exact_match", "has_answer_f1", "no_answer_accuracy"]
    values = task.runtime.metrics(names, Evaluated(1.0, outcomes=kept))
    assert values == {"exact_match": 1.0, "has_answer_f1": 1.0, "no_answer_accuracy": 1.0}
    careful = bench("question-answering", null_threshold=10.0)
    assert careful.runtime.metrics(names, Evaluated(1.0, outcomes=kept))["exact_match"] == 0.5
    # Where every question has an answer, one is given.
    alone = Evaluated(1.0, outcomes=[outcome(answered, first, last, 1.0, 5.0)])
    assert task.runtime.metrics(["exact_match"], alone) == {"exact_match": 1.0}


def test_an_answer_has_so_many_tokens_and_no_more(bench: Any) -> None:
    task = bench("question-answering", max_answer_length=2)
    (example,) = task.encode(ROWS[:1])
    (row,) = task.runtime.predictions(Evaluated(1.0, outcomes=[outcome(example, 8, 14)]))
    assert len(row["prediction"]) < 12


def test_training_learns_the_answers_and_peft_loads_them(
    bench: Any, bases: Any, tmp_path: Path
) -> None:
    task = bench("question-answering")
    model = task.adapt(task.load(bases["bert"]), "lora")
    examples = task.encode(ROWS)
    out = task.learn(model, examples, rate=1e-2)
    for side, column in (("start", 0), ("end", 1)):
        best = out.outcomes[side].argmax(dim=1)
        assert best.tolist() == [int(example.target[column]) for example in examples]
    task.export(model, tmp_path)
    base = AutoModelForQuestionAnswering.from_pretrained(bases["bert"])
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = task.collate(examples).inputs()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).start_logits, model(**inputs).start_logits)


def test_a_question_that_leaves_no_room_is_refused(bench: Any) -> None:
    with pytest.raises(InvalidData, match="row 0: the question has 3 tokens") as caught:
        bench("question-answering").encode([{**UNANSWERED}], max_length=6)
    assert caught.value.code == "too_long"
