"""The shelf of formats: found by themselves, told apart by their columns and values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import pytest

from tunery import catalogue
from tunery.data import formats
from tunery.data.formats import Finding, Format
from tunery.data.formats._base import as_it_is, check_strings
from tunery.data.read import read_rows
from tunery.data.validate import validate
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`install(format)`: as if an installed package offered it by entry point."""

    def installed(form: Format) -> None:
        point = type("Point", (), {"load": lambda self: form})()
        monkeypatch.setattr(formats, "entry_points", lambda group: [point])
        formats.known.cache_clear()
        formats.json_columns.cache_clear()

    yield installed
    formats.known.cache_clear()
    formats.json_columns.cache_clear()


def form(name: str, *columns: str, **more: Any) -> Format:
    return Format(
        name=name,
        task="text-generation",
        spellings=(frozenset(columns),),
        check=check_strings(*columns),
        normal=as_it_is,
        content=columns,
        **more,
    )


def test_every_format_asks_for_a_task_that_reads_it() -> None:
    for name, found in formats.known().items():
        assert found.name == name
        assert name in catalogue.find("tasks", found.task).formats


def test_a_format_of_another_package_is_found_and_detected(install: Any) -> None:
    install(form("haiku", "first", "second", "third", json_columns=frozenset({"third"})))
    found = formats.detect({"first": "a", "second": "b", "third": "c"})
    assert isinstance(found, Format)
    assert found.name == "haiku"
    assert "third" in formats.json_columns()


def test_two_formats_of_one_name_are_an_error(install: Any) -> None:
    install(form("chat", "first"))
    with pytest.raises(RuntimeError, match="two formats are named 'chat'"):
        formats.known()


def test_values_decide_between_formats_of_the_same_columns(install: Any) -> None:
    install(form("odd", "text", claims=lambda row: row["text"] == "odd"))
    both = formats.detect({"text": "odd"})
    assert isinstance(both, Finding)
    assert both.code == "mixed_formats"
    plain = formats.detect({"text": "even"})
    assert isinstance(plain, Format)
    assert plain.name == "text"


def test_an_incomplete_row_is_taken_for_the_format_that_lacks_least() -> None:
    found = formats.detect({"prompt": "a"})
    assert isinstance(found, Finding)
    assert (found.code, found.path) == ("missing_field", "completion")
    assert found.message == "a prompt_completion row needs completion"


def test_a_miss_lists_what_there_is() -> None:
    with pytest.raises(InvalidConfig) as caught:
        formats.find("prose")
    assert "chat" in (caught.value.hint or "")


QUESTION = {"question": "who", "context": "Ada did"}

# One row each: format, the row, its normal form, its labels.
ROWS: list[tuple[str, Any, Any, list[str] | None]] = [
    (
        "token_classification",
        {"tokens": ["Ada", "L"], "ner_tags": [1, 2]},
        {"tokens": ["Ada", "L"], "tags": ["1", "2"]},
        ["1", "2"],
    ),
    (
        "token_classification",
        {"tokens": "Ada L", "tags": "B-PER O"},
        {"tokens": ["Ada", "L"], "tags": ["B-PER", "O"]},
        ["B-PER", "O"],
    ),
    (
        "classification",
        {"premise": "a", "hypothesis": "b", "label": "yes"},
        {"text": "a", "text_pair": "b", "label": "yes"},
        ["yes"],
    ),
    (
        "classification",
        {"text": "a", "text_pair": "b", "label": "yes"},
        {"text": "a", "text_pair": "b", "label": "yes"},
        ["yes"],
    ),
    (
        "multi_label",
        {"text": "a", "labels": ["y", "x", "y"]},
        {"text": "a", "labels": ["x", "y"]},
        ["x", "y"],
    ),
    ("regression", {"text": "a", "target": "1.5"}, {"text": "a", "target": 1.5}, None),
    (
        "regression",
        {"text": "a", "text_pair": "b", "score": 2},
        {"text": "a", "text_pair": "b", "target": 2.0},
        None,
    ),
    (
        "question_answering",
        {
            "question": "who",
            "context": "Ada did",
            "answers": {"text": ["Ada"], "answer_start": [0]},
        },
        {
            "question": "who",
            "context": "Ada did",
            "answers": [{"text": "Ada", "answer_start": 0}],
        },
        None,
    ),
    (
        "question_answering",
        {"question": "who", "context": "Ada did", "answers": []},
        {"question": "who", "context": "Ada did", "answers": []},
        None,
    ),
    (
        "pairs",
        {"question": "a", "answer": "b", "negative": "c", "negatives": ["d"]},
        {"anchor": "a", "positive": "b", "negatives": ["c", "d"]},
        None,
    ),
    (
        "pairs",
        {"anchor": "a", "positive": "b"},
        {"anchor": "a", "positive": "b", "negatives": []},
        None,
    ),
    (
        "transcription",
        {"audio": "UklGRg==", "sentence": "a"},
        {"audio": b"RIFF", "text": "a"},
        None,
    ),
    ("source_target", {"source": "a", "target": "b"}, {"source": "a", "target": "b"}, None),
    (
        "similarity",
        {"sentence1": "a", "sentence2": "b", "score": 4.5},
        {"sentence1": "a", "sentence2": "b", "score": 4.5},
        None,
    ),
]


@pytest.mark.parametrize(("name", "row", "normal", "labels"), ROWS)
def test_rows_are_detected_and_have_one_normal_form(
    name: str, row: Any, normal: Any, labels: list[str] | None
) -> None:
    found = formats.detect(row)
    assert isinstance(found, Format)
    assert found.name == name
    assert [f.code for f in found.check(row)] == []
    assert found.normal(row) == normal
    assert (None if found.labels is None else list(found.labels(normal))) == labels


@pytest.mark.parametrize(("name", "row", "normal", "labels"), ROWS)
def test_the_same_rows_are_read_from_csv_and_parquet(
    name: str, row: Any, normal: Any, labels: list[str] | None, tmp_path: Path
) -> None:
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), parquet)
    cells = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
    quoted = ",".join(f'"{c.replace(chr(34), chr(34) * 2)}"' for c in cells)
    csv = tmp_path / "rows.csv"
    csv.write_text(",".join(row) + "\n" + quoted + "\n")
    for path in (parquet, csv):
        assert [found for _, found in read_rows(path, path.suffix)] == [normal]
        report = validate(path, path.suffix)
        assert report.format == name
        assert report.labels == (None if labels is None else formats.sorted_labels(labels))


@pytest.mark.parametrize(
    ("good", "row", "path", "code"),
    [
        ("token_classification", {"tokens": ["a"], "tags": ["O", "O"]}, "tags", "wrong_length"),
        (
            "token_classification",
            {"tokens": ["a", 7], "tags": ["O", "O"]},
            "tokens.1",
            "wrong_type",
        ),
        ("token_classification", {"tokens": ["a"], "tags": [1.5]}, "tags.0", "wrong_type"),
        ("token_classification", {"tokens": [], "tags": []}, "tokens", "missing_field"),
        ("token_classification", {"tokens": ["a"]}, "tags", "missing_field"),
        ("classification", {"text": "a", "text_pair": 7, "label": 1}, "text_pair", "wrong_type"),
        ("multi_label", {"text": "a", "labels": "x"}, "labels", "wrong_type"),
        ("multi_label", {"text": "a", "labels": ["x", 1.5]}, "labels.1", "wrong_type"),
        ("regression", {"text": "a", "target": "much"}, "target", "wrong_type"),
        ("regression", {"text": "a", "target": "nan"}, "target", "wrong_type"),
        ("question_answering", {**QUESTION, "answers": "x"}, "answers", "wrong_type"),
        (
            "question_answering",
            {**QUESTION, "answers": [{"text": "did", "answer_start": 3}]},
            "answers.0.answer_start",
            "answer_not_in_context",
        ),
        (
            "question_answering",
            {**QUESTION, "answers": [{"text": "", "answer_start": 3}]},
            "answers.0.text",
            "wrong_type",
        ),
        ("pairs", {"anchor": "a", "positive": 1}, "positive", "wrong_type"),
        (
            "pairs",
            {"anchor": "a", "positive": "b", "negatives": ["c", 1]},
            "negatives.1",
            "wrong_type",
        ),
        ("similarity", {"sentence1": 1, "sentence2": "b", "score": 1}, "sentence1", "wrong_type"),
    ],
)
def test_what_is_wrong_is_named_by_path_and_code(good: str, row: Any, path: str, code: str) -> None:
    first = next(formats.check(row, formats.find(good)))
    assert (first.path, first.code) == (path, code)
