from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tunery.cli.main import run

if TYPE_CHECKING:
    from pathlib import Path


def _write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def training(tmp_path: Path) -> str:
    return _write(tmp_path / "train.jsonl", [f"row {i}" for i in range(12)])


def test_a_good_file_is_described(training: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", training]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"valid\tyes", "format\ttext", "rows\t12"} <= set(lines)


def test_a_broken_file_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    assert run(["data", "check", str(broken)]) == 3
    assert "error\tline 2: " in capsys.readouterr().out


def test_validation_rows_that_are_trained_on_are_named(
    training: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = _write(tmp_path / "valid.jsonl", ["new", "row 3", *(f"n{i}" for i in range(9))])
    assert run(["data", "check", training, "--validation", held_out, "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["file"], first["problems"]) == (training, [])
    assert second["file"] == held_out
    assert second["problem_counts"] == {"train_valid_overlap": 1}
    (problem,) = second["problems"]
    assert (problem["line"], problem["severity"]) == (2, "warning")
    assert "line 4 of the training file" in problem["message"]


def test_a_broken_validation_file_is_refused_too(
    training: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "valid.jsonl"
    broken.write_text('{"text": 1}\n')
    assert run(["data", "check", training, "--validation", str(broken)]) == 3
    assert str(broken) in capsys.readouterr().out
