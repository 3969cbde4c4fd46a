"""Whisper: transformers' loss, generation and error rates, the adapter loaded again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq

from tests.tunery.tasks.media import tone
from tunery.errors import BaseModelUnavailable
from tunery.training.checkpoint import write_json
from tunery.training.types import IGNORE, Evaluated, Outcome

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"audio": tone(300), "text": "in the sea"}, {"audio": tone(2500, 0.5), "text": "Bob"}]


@pytest.fixture
def task(bench: Any, bases: Any) -> Any:
    made = bench("speech-to-text", max_target_length=16)
    made.tokenizer = made.runtime.load_tokenizer(bases["whisper"])
    return made


def test_the_loss_is_that_of_transformers(task: Any, bases: Any) -> None:
    model = task.load(bases["whisper"])
    examples = task.encode(ROWS)
    batch = task.collate(examples)
    assert batch.inputs().keys() == {"input_features", "decoder_input_ids"}
    labels = torch.full((2, batch.width), IGNORE)
    for row, example in zip(labels, examples, strict=True):
        said = torch.from_numpy(example.documents[-1].labels[1:])
        row[: len(said)] = said
    with torch.no_grad():
        ours = task.loss(model, examples)
        theirs = model(input_features=batch.extras["input_features"], labels=labels)
    units = sum(task.runtime.units(example) for example in examples)
    assert units == int((labels != IGNORE).sum())
    assert float(ours.loss) / units == pytest.approx(float(theirs.loss), abs=1e-5)


def test_the_start_that_the_tokenizer_writes_is_not_learnt_twice(task: Any, bases: Any) -> None:
    task.load(bases["whisper"])
    (example, _) = task.encode(ROWS)
    text = task.tokenizer.convert_ids_to_tokens(example.documents[-1].input_ids.tolist()[1:])
    assert text[0] == "in"
    assert text[-1] == "[SEP]"
    assert task.collate([example]).extras["decoder_input_ids"][0, 0] == 1
    assert len(example.documents[0].input_ids) == 50  # what the encoder costs


def test_a_model_that_learnt_its_sounds_says_them(task: Any, bases: Any, tmp_path: Path) -> None:
    model = task.adapt(task.load(bases["whisper"]), "lora")
    examples = task.encode(ROWS)
    out = task.learn(model, examples, steps=80, rate=2e-2)
    batch = task.collate(examples)
    said = task.runtime.outcomes(model, batch, out, ["wer"])["said"]
    assert task.runtime.outcomes(model, batch, out, ["loss"]) == {}
    kept = [Outcome(e, {"said": row.numpy()}) for e, row in zip(examples, said, strict=True)]
    seen = Evaluated(0.1, outcomes=kept, tokenizer=task.tokenizer)
    values = task.runtime.metrics(["loss", "wer", "cer", "normalized_wer"], seen)
    assert values == {"loss": 0.1, "wer": 0.0, "cer": 0.0, "normalized_wer": 0.0}
    assert [row["prediction"] for row in task.runtime.predictions(seen)] == ["in the sea", "Bob"]
    task.export(model, tmp_path)
    for path, document in task.runtime.export_files().items():
        write_json(tmp_path / path, document)
    assert AutoFeatureExtractor.from_pretrained(tmp_path).feature_size == 16
    base = AutoModelForSpeechSeq2Seq.from_pretrained(bases["whisper"])
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = batch.inputs()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_folder_without_a_speech_model_is_refused(bench: Any, bases: Any) -> None:
    with pytest.raises(BaseModelUnavailable, match="how audio is prepared"):
        bench("speech-to-text").runtime.load_tokenizer(bases["bert"])
