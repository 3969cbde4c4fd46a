"""Sounds and pictures: decoding, the loss of transformers, heads saved, refusals."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from tests.tunery.tasks.media import square, tone
from tunery.data import formats
from tunery.errors import BaseModelUnavailable, InvalidData, UnsupportedCombination
from tunery.tasks import _media
from tunery.training.checkpoint import write_json

if TYPE_CHECKING:
    from pathlib import Path

LABELS = ("low", "high")
AUDIO = [{"audio": tone(200), "label": "low"}, {"audio": tone(1800), "label": "high"}]
IMAGES = [{"image": square(10), "label": "low"}, {"image": square(200), "label": "high"}]
CASES = [
    ("image-classification", "vit", IMAGES, "AutoModelForImageClassification"),
    ("audio-classification", "ast", AUDIO, "AutoModelForAudioClassification"),
    ("audio-classification", "wav2vec2", AUDIO, "AutoModelForAudioClassification"),
]
every_case = pytest.mark.parametrize(
    ("name", "family", "rows", "auto"), CASES, ids=[case[1] for case in CASES]
)


def task_of(bench: Any, name: str, folder: Path) -> Any:
    config = {"max_seconds": 0.25} if name == "audio-classification" else {}
    task = bench(name, **config)
    task.tokenizer = task.runtime.load_tokenizer(folder)
    return task


def preparer_of(name: str, folder: Path) -> Any:
    kind = "AutoImageProcessor" if name == "image-classification" else "AutoFeatureExtractor"
    return getattr(transformers, kind).from_pretrained(folder)


@every_case
def test_the_loss_is_that_of_transformers(
    bench: Any, bases: Any, name: str, family: str, rows: Any, auto: str
) -> None:
    task = task_of(bench, name, bases[family])
    model = task.load(bases[family], LABELS)
    examples = task.encode(rows, LABELS)
    batch = task.collate(examples)
    assert batch.inputs().keys() == {next(iter(batch.extras))}
    with torch.no_grad():
        ours = task.loss(model, examples)
        theirs = model(**batch.inputs(), labels=batch.targets)
        alone = sum(task.loss(model, [example]).loss for example in examples)
    assert float(ours.loss) / 2 == pytest.approx(float(theirs.loss), abs=1e-5)
    assert float(ours.loss) == pytest.approx(float(alone), abs=1e-4)
    assert model.config.id2label == dict(enumerate(LABELS))


@every_case
def test_training_learns_and_peft_loads_the_result(
    bench: Any, bases: Any, tmp_path: Path, name: str, family: str, rows: Any, auto: str
) -> None:
    task = task_of(bench, name, bases[family])
    model = task.adapt(task.load(bases[family], LABELS), "lora")
    examples = task.encode(rows, LABELS)
    out = task.learn(model, examples, steps=40, rate=2e-2)
    assert out.outcomes["scores"].argmax(dim=1).tolist() == [0, 1]
    task.export(model, tmp_path)
    for path, document in task.runtime.export_files().items():
        write_json(tmp_path / path, document)
    about = transformers.AutoConfig.from_pretrained(tmp_path)
    assert about.id2label == dict(enumerate(LABELS))
    base = getattr(transformers, auto).from_pretrained(bases[family], config=about)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        inputs = task.collate(examples).inputs()
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    saved, used = preparer_of(name, tmp_path), preparer_of(name, bases[family])
    assert saved.to_dict() == used.to_dict()


@pytest.mark.parametrize("adapter", ["prompt", "prefix"])
def test_soft_prompts_need_a_text(bench: Any, bases: Any, adapter: str) -> None:
    task = task_of(bench, "image-classification", bases["vit"])
    with pytest.raises(UnsupportedCombination, match="this task's model reads none"):
        task.adapt(task.load(bases["vit"], LABELS), adapter)


def test_pictures_are_prepared_as_transformers_does(bench: Any, bases: Any) -> None:
    task = task_of(bench, "image-classification", bases["vit"])
    task.load(bases["vit"], LABELS)
    array, positions = task.runtime.prepared(square(50, 30, "JPEG"), 0)
    assert array.shape == (3, 16, 16)
    assert positions == 5  # two by two patches, and one for all
    picture = _media.image(square(50, 30, "JPEG"), 0)
    theirs = preparer_of("image-classification", bases["vit"])(picture, return_tensors="np")
    np.testing.assert_array_equal(array, theirs["pixel_values"][0])


@pytest.mark.parametrize(("have", "want"), [(8000, 16000), (44100, 16000), (48000, 8000)])
def test_a_resampled_sine_is_the_sine_at_the_other_rate(have: int, want: int) -> None:
    def sine(rate: int) -> Any:
        return np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate).astype(np.float32)

    ours, expected = _media.resampled(sine(have), have, want), sine(want)
    assert len(ours) == len(expected)
    middle = slice(want // 20, -want // 20)  # the ends are cut off from their neighbours
    assert np.abs(ours[middle] - expected[middle]).max() < 0.01


def test_channels_are_mixed_and_what_is_too_long_is_cut() -> None:
    mono, stereo = (_media.audio(tone(300, channels=n), 8000, 0.1, 0) for n in (1, 2))
    assert len(mono) == 800
    np.testing.assert_allclose(mono, stereo, atol=1e-4)
    assert mono.dtype == np.float32


def test_short_waveforms_end_in_silence(bench: Any, bases: Any) -> None:
    task = task_of(bench, "audio-classification", bases["wav2vec2"])
    array, _ = task.runtime.prepared(tone(300, 0.1), 0)
    assert array.shape == (4000,)
    assert not array[1700:].any()


def test_what_cannot_be_decoded_names_the_row(bench: Any, bases: Any) -> None:
    broken = {"audio": b"RIFF" + b"x" * 40, "label": "low"}
    with pytest.raises(InvalidData, match="row 0: the audio cannot be decoded") as caught:
        task_of(bench, "audio-classification", bases["ast"]).encode([broken], LABELS)
    assert caught.value.code == "bad_media"
    with pytest.raises(InvalidData, match="row 3: the image cannot be decoded"):
        _media.image(b"\x89PNG nothing", 3)
    with pytest.raises(InvalidData, match="row 3: the audio is empty"):
        _media.audio(tone(100, 0.0), 8000, 1.0, 3)


def test_pictures_of_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_media, "MOST_PIXELS", 100)
    with pytest.raises(InvalidData, match="more than 100 pixels"):
        _media.image(square(1, 11), 0)


def test_a_folder_that_does_not_say_how_inputs_are_prepared_is_refused(
    bench: Any, bases: Any
) -> None:
    with pytest.raises(BaseModelUnavailable, match="how an image is prepared"):
        bench("image-classification").runtime.load_tokenizer(bases["bert"])


@pytest.mark.parametrize("name", ["audio-classification", "image-classification"])
def test_base64_and_structs_of_bytes_are_the_same_row(name: str) -> None:
    column, data = ("audio", tone(100)) if name.startswith("audio") else ("image", square(1))
    form = formats.find(name.replace("-", "_"))
    for value in (data, {"bytes": data, "path": "x"}, base64.b64encode(data).decode()):
        row = {column: value, "label": 3}
        assert list(form.check(row)) == []
        assert form.normal(row) == {column: data, "label": "3"}
    wrong = next(iter(form.check({column: "bm90IGE=", "label": 3})))
    assert (wrong.code, wrong.path) == ("unknown_media", column)
    json.dumps(wrong.message)
