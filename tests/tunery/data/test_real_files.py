"""Data as it is found: read, counted and detected. Skipped where it is not at hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tunery.data.read import read_rows
from tunery.data.validate import validate
from tunery.tasks import _media

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def data(shared_dir: Path) -> Any:
    """`data(name)`: the path of a file, or a skip."""

    def found(name: str) -> Path:
        path = shared_dir / "data" / name
        if not path.is_file():
            pytest.skip(f"no {name} here")
        return path

    return found


def test_spoken_digits_are_sounds_with_ten_labels(data: Any) -> None:
    path = data("fsdd/test.parquet")
    report = validate(path, ".parquet")
    assert (report.format, report.rows, report.valid) == ("audio_classification", 240, True)
    assert report.labels == [str(digit) for digit in range(10)]
    _, row = next(iter(read_rows(path, ".parquet")))
    samples = _media.audio(row["audio"], 16000, 10.0, 0)
    assert 0.1 < len(samples) / 16000 < 3
    assert 0.05 < abs(samples).max() <= 1.1


def test_the_sts_benchmark_is_similarity_data(data: Any) -> None:
    report = validate(data("stsb/en-dev.jsonl"), ".jsonl")
    assert (report.format, report.rows, report.valid) == ("similarity", 1500, True)


def test_every_answer_of_xquad_stands_where_it_says(data: Any, tmp_path: Path) -> None:
    """Chinese, too: starts count characters, not bytes."""
    for language in ("en", "zh"):
        document = json.loads(data(f"xquad/xquad.{language}.json").read_text("utf-8"))
        path = tmp_path / f"{language}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for article in document["data"]:
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        row = {**question, "context": paragraph["context"]}
                        file.write(json.dumps(row) + "\n")
        report = validate(path, ".jsonl")
        assert (report.format, report.rows, report.valid) == ("question_answering", 1190, True)
