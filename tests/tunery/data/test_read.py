"""Rows as the trainer gets them: the same from every kind of file, in their one normal form."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import pytest

from tunery.data.read import parse, read_rows, suffix_of
from tunery.errors import InvalidConfig, InvalidData

if TYPE_CHECKING:
    from pathlib import Path

USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PREFERENCE = {
    "input": {"messages": [USER]},
    "preferred_output": [GOOD],
    "non_preferred_output": [BAD],
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: value if isinstance(value, str) else json.dumps(value)
                    for key, value in row.items()
                }
            )


WRITERS = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gzip,
    ".parquet": write_parquet,
    ".csv": write_csv,
}

ROWS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [USER, {**GOOD, "weight": 1}]},
    "prompt_completion": {"prompt": "p", "completion": 'c, d\n"e" é'},
    "text": {"text": "t"},
    "classification": {"text": "t", "label": "x"},
    "preference": PREFERENCE,
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("format", ROWS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str, format: str) -> None:
    path = tmp_path / "data"
    WRITERS[suffix](path, [ROWS[format]] * 200)
    rows = list(read_rows(path, suffix))
    assert [row for _, row in rows] == [ROWS[format]] * 200
    if suffix != ".csv":
        assert [line for line, _ in rows] == list(range(1, 201))
    assert list(read_rows(path, suffix, format)) == rows


Normal = tuple[dict[str, Any], dict[str, Any]]

NORMAL_FORMS: list[Normal] = [
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, PREFERENCE),
    (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "score": 1},
        {**PREFERENCE, "score": 1},
    ),
    # Whole conversations on both sides, as many data sets have them.
    ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PREFERENCE),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PREFERENCE),
    ({"text": "t", "labels": 3}, {"text": "t", "label": "3"}),
    ({"text": "t", "label": 3, "source": "s"}, {"text": "t", "label": "3", "source": "s"}),
    ({"text": "t", "note": None}, {"text": "t"}),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {**GOOD, "name": None},
            ]
        },
        {"messages": [{"role": "user", "content": "ab"}, GOOD]},
    ),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"x": 1}'},
                        }
                    ],
                },
            ]
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": {"x": 1}},
                        }
                    ],
                },
            ]
        },
    ),
]


@pytest.mark.parametrize(("given", "normal"), NORMAL_FORMS)
def test_rows_come_in_their_normal_form(
    tmp_path: Path, given: dict[str, Any], normal: dict[str, Any]
) -> None:
    path = tmp_path / "data"
    write_jsonl(path, [given])
    before = json.dumps(given)
    assert [row for _, row in read_rows(path, ".jsonl")] == [normal]
    assert json.dumps(given) == before
    write_jsonl(path, [normal])
    assert [row for _, row in read_rows(path, ".jsonl")] == [normal]


def test_blank_lines_count_and_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n \r\n{"text": "b"}')
    assert list(read_rows(path, ".jsonl")) == [(1, {"text": "a"}), (4, {"text": "b"})]


@pytest.mark.parametrize(
    ("second", "code"), [('{"text": 7}', "wrong_type"), ("secret", "bad_json")]
)
def test_a_bad_row_is_named_and_not_quoted(tmp_path: Path, second: str, code: str) -> None:
    path = tmp_path / "data"
    path.write_text('{"text": "a"}\n\n' + second + "\n")
    rows = read_rows(path, ".jsonl")
    assert next(rows) == (1, {"text": "a"})
    with pytest.raises(InvalidData) as caught:
        next(rows)
    assert caught.value.problems[0]["line"] == 3
    assert caught.value.problems[0]["code"] == code
    assert "secret" not in str(caught.value)


def test_a_file_that_ends_too_early_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "data"
    write_gzip(path, [{"text": str(i)} for i in range(9)])
    path.write_bytes(path.read_bytes()[:-4])
    rows = read_rows(path, ".jsonl.gz")
    with pytest.raises(InvalidData) as caught:
        list(rows)
    assert caught.value.problems[0]["line"] == 10


def test_a_named_format_is_kept_to(tmp_path: Path) -> None:
    path = tmp_path / "data"
    write_jsonl(path, [{"text": "a", "label": "b"}])
    assert list(read_rows(path, ".jsonl", "text")) == [(1, {"text": "a", "label": "b"})]
    with pytest.raises(InvalidData):
        list(read_rows(path, ".jsonl", "chat"))


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"\.txt"):
        list(read_rows(tmp_path / "data", ".txt"))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("train.jsonl", ".jsonl"),
        ("TRAIN.JSONL.GZ", ".jsonl.gz"),
        ("a.b.csv", ".csv"),
        ("x.parquet", ".parquet"),
        ("x.json", None),
        ("x.gz", None),
        ("", None),
    ],
)
def test_names_tell_how_to_read(name: str, suffix: str | None) -> None:
    assert suffix_of(name) == suffix


def test_brackets_in_strings_are_no_depth() -> None:
    text = "[{" * 500 + '\\"' + "[" * 99
    assert parse(json.dumps({"text": text}).encode()) == {"text": text}


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, tunery.data.validate; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == [b"False", b"False"]
