"""Encoder-decoder models: transformers' loss, packing of batches, generation, adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from tunery.errors import BaseModelUnavailable, InvalidData
from tunery.training.types import IGNORE, Evaluated, LossOutput, Outcome

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [
    {"source": "who is in the sea", "target": "Bob"},
    {"source": "where", "target": "in the good sea"},
]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_is_that_of_transformers(bench: Any, bases: Any, family: str) -> None:
    task = bench("sequence-to-sequence")
    model = task.load(bases[family])
    examples = task.encode(ROWS, format="source_target")
    batch = task.collate(examples)
    width = max(len(example.documents[1].labels) for example in examples) - 1
    labels = torch.full((2, width), IGNORE)
    for row, example in zip(labels, examples, strict=True):
        said = torch.from_numpy(example.documents[1].labels[1:])
        row[: len(said)] = said
    with torch.no_grad():
        ours = task.loss(model, examples)
        theirs = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        )
        alone = sum(task.loss(model, [example]).loss for example in examples)
    units = sum(task.runtime.units(example) for example in examples)
    assert units == int((labels != IGNORE).sum()) == batch.supervised
    assert float(ours.loss) / units == pytest.approx(float(theirs.loss), abs=1e-5)
    assert float(ours.loss) == pytest.approx(float(alone), abs=1e-4)


def test_the_decoder_begins_with_the_models_start(bench: Any, bases: Any) -> None:
    task = bench("sequence-to-sequence")
    for family, start in (("t5", 0), ("bart", 2)):
        task.load(bases[family])
        batch = task.collate(task.encode(ROWS, format="source_target"))
        assert batch.extras["decoder_input_ids"][:, 0].tolist() == [start, start]
        assert batch.input_ids[:, 0].tolist() == [1, 1]


def test_prompts_and_completions_are_sources_and_targets(bench: Any, tokenizer: Any) -> None:
    task = bench("sequence-to-sequence")
    rows = [{"prompt": "who", "completion": "Bob"}]
    (example,) = task.encode(rows, format="prompt_completion")
    read, said = (tokenizer.decode(document.input_ids) for document in example.documents)
    assert (read, said) == ("[CLS] who [SEP]", "</s> [CLS] Bob [SEP]")


def test_targets_are_cut_at_their_own_length(bench: Any) -> None:
    task = bench("sequence-to-sequence", max_target_length=4)
    (example,) = task.encode([{"source": "who " * 99, "target": "in " * 9}], format="source_target")
    assert [len(document.input_ids) for document in example.documents] == [64, 5]


@pytest.mark.parametrize(
    ("family", "adapter"),
    [("t5", "lora"), ("t5", "prompt"), ("bart", "ia3"), ("bart", "prefix"), ("bart", "prompt")],
)
def test_adapters_learn_and_peft_loads_them(
    bench: Any, bases: Any, tmp_path: Path, family: str, adapter: str
) -> None:
    task = bench("sequence-to-sequence")
    model = task.adapt(task.load(bases[family]), adapter)
    examples = task.encode(ROWS, format="source_target")
    with torch.no_grad():
        before = float(task.loss(model.eval(), examples).loss)
    after = float(task.learn(model, examples, steps=20, rate=3e-2).loss)
    assert after < before * 0.95
    task.export(model, tmp_path)
    base = AutoModelForSeq2SeqLM.from_pretrained(bases[family])
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = task.collate(examples).inputs()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_model_that_learnt_its_targets_says_them(bench: Any, bases: Any) -> None:
    task = bench("sequence-to-sequence", max_target_length=16)
    model = task.adapt(task.load(bases["bart"]), "full")
    examples = task.encode(ROWS, format="source_target")
    out = task.learn(model, examples, steps=60, rate=3e-3)
    batch = task.collate(examples)
    names = ["rouge_l", "bleu", "chrf", "exact_match"]
    assert task.runtime.outcomes(model, batch, out, ["loss"]) == {}
    said = task.runtime.outcomes(model, batch, out, names)["said"]
    outcomes = [
        Outcome(example, {"said": row.numpy()}) for example, row in zip(examples, said, strict=True)
    ]
    seen = Evaluated(0.1, outcomes=outcomes, tokenizer=task.tokenizer)
    values = task.runtime.metrics(names, seen)
    assert values["exact_match"] == 1.0
    assert values["rouge_l"] == 1.0
    assert values["chrf"] == pytest.approx(100)
    rows = list(task.runtime.predictions(seen))
    assert [row["prediction"] for row in rows] == ["Bob", "in the good sea"]
    assert [row["label"] for row in rows] == ["Bob", "in the good sea"]


def test_likelihood_alone_needs_no_generation(bench: Any) -> None:
    task = bench("sequence-to-sequence")
    seen = Evaluated(0.0, {"mean_token_accuracy": 0.5})
    names = ["loss", "perplexity", "token_accuracy", "bleu"]
    values = task.runtime.metrics(names, seen)
    assert values == {"loss": 0.0, "perplexity": 1.0, "token_accuracy": 0.5}


def test_refusals(bench: Any, bases: Any) -> None:
    task = bench("sequence-to-sequence")
    with pytest.raises(BaseModelUnavailable):
        task.load(bases["llama"])
    with pytest.raises(InvalidData, match="row 0: the target has no tokens"):
        task.runtime.target_document([], task.tokenizer, 0)
    assert LossOutput(torch.zeros(())).outcomes == {}
