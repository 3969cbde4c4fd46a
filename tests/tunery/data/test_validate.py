"""Stage A: every code with its line, every attack with a clear answer, and no text quoted."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.data import read
from tunery.data.read import Limits
from tunery.data.validate import Digests, Report, Validator, overlap, validate

if TYPE_CHECKING:
    from pathlib import Path

CANARY = "canary-7f3a"
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def say(role: str, content: Any = CANARY, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def call(name: str = "look", arguments: Any = "{}", id: str = "c1") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return say("assistant", None, tool_calls=[{"id": id, "type": "function", "function": function}])


def lines(*rows: Any) -> bytes:
    """Each row on its line; bytes as they are."""
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def report_on(data: bytes, suffix: str = ".jsonl", step: int = 1 << 16, **more: Any) -> Report:
    validator = Validator(suffix, **more)
    for start in range(0, len(data), step):
        validator.feed(data[start : start + step])
    return validator.finish()


def found(report: Report) -> list[tuple[int | None, str | None, str, str]]:
    """Everything but the remark that a small file is small."""
    return [
        (problem["line"], problem["path"], problem["code"], problem["severity"])
        for problem in report.problems
        if (problem["line"], problem["code"]) != (None, "too_few_examples")
    ]


# One row each, as the third line of a file of good rows.
BAD_CHATS: list[tuple[Any, str | None, str]] = [
    (b'{"messages": "\xff\xfe"}', None, "not_utf8"),
    (b'{"messages": ["\\ud800"]}', None, "not_utf8"),
    (b'{"messages": [}', None, "bad_json"),
    (b'{"messages": NaN}', None, "bad_json"),
    (b'{"messages": [], "x": -Infinity}', None, "bad_json"),
    (b'{"messages": [], "x": 1e999}', None, "bad_json"),
    (b'{"messages": [], "x": ' + b"9" * 5000 + b"}", None, "bad_json"),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "bad_json"),
    (b'{"a":' * 65 + b"1" + b"}" * 65, None, "bad_json"),
    (b'{"messages": "a\0b"}', None, "bad_json"),
    (b'{"messages": "a\\u0000b"}', None, "wrong_type"),
    (b"[1, 2]", None, "not_object"),
    (b'"text"', None, "not_object"),
    ({CANARY: 1}, None, "unknown_format"),
    ({"text": CANARY}, None, "mixed_formats"),
    ({"prompt": CANARY, "completion": CANARY}, None, "mixed_formats"),
    ({"messages": None}, "messages", "missing_field"),
    ({"messages": CANARY}, "messages", "wrong_type"),
    ({"messages": []}, "messages", "empty_messages"),
    (chat(CANARY), "messages.0", "wrong_type"),
    (chat({"content": CANARY}), "messages.0.role", "missing_field"),
    (chat({"role": 7, "content": CANARY}), "messages.0.role", "wrong_type"),
    (chat(say(CANARY)), "messages.0.role", "bad_role"),
    (chat(say("user"), {"role": "assistant"}), "messages.1.content", "missing_field"),
    (chat(say("user", 7)), "messages.0.content", "wrong_type"),
    (chat(say("user", [{"type": "image_url"}])), "messages.0.content", "wrong_type"),
    (chat(say("user", name=3), say("assistant")), "messages.0.name", "wrong_type"),
    (chat(say("user"), say("tool")), "messages.1", "bad_role_order"),
    (chat(say("user")), "messages", "no_assistant_turn"),
    (chat(say("user"), say("assistant", weight=2)), "messages.1.weight", "bad_weight"),
    (chat(say("user"), say("assistant", weight=True)), "messages.1.weight", "bad_weight"),
    (chat(say("user"), say("assistant", weight=-0.5)), "messages.1.weight", "bad_weight"),
    (chat(say("user"), say("assistant", weight="1")), "messages.1.weight", "bad_weight"),
    (chat(say("user"), say("assistant"), tools={}), "tools", "bad_tool_schema"),
    (chat(say("user"), say("assistant"), tools=[CANARY]), "tools.0", "bad_tool_schema"),
    (
        chat(say("user"), say("assistant"), tools=[{"type": "function", "function": {}}]),
        "tools.0.function.name",
        "bad_tool_schema",
    ),
    (
        chat(say("user"), call(arguments=CANARY)),
        "messages.1.tool_calls.0.function.arguments",
        "bad_tool_schema",
    ),
    (
        chat(say("user"), call("other"), say("tool", tool_call_id="c1"), tools=[TOOL]),
        "messages.1.tool_calls.0.function.name",
        "tool_call_mismatch",
    ),
    (
        chat(say("user"), call(), say("tool", tool_call_id=CANARY), say("assistant")),
        "messages.2.tool_call_id",
        "tool_call_mismatch",
    ),
    (chat(say("user"), call(), say("user"), say("assistant")), "messages.2", "tool_call_mismatch"),
]


@pytest.mark.parametrize(("row", "path", "code"), BAD_CHATS)
def test_a_bad_conversation_is_named_by_line_path_and_code(
    row: Any, path: str | None, code: str
) -> None:
    report = report_on(lines(GOOD, {**GOOD, "tools": []}, row))
    errors = [problem for problem in found(report) if problem[3] == "error"]
    assert errors[0] == (3, path, code, "error")
    assert not report.valid
    assert report.problem_counts[code] >= 1
    assert CANARY not in json.dumps(report.as_json())


ODD_CHATS: list[tuple[Any, str | None, str]] = [
    (chat(say("user"), say("assistant", weight=0)), "messages", "no_trainable_tokens"),
    (chat(say("user"), say("assistant", "")), "messages", "no_trainable_tokens"),
    (chat(say("user"), say("user"), say("assistant")), "messages.1", "bad_role_order"),
    (chat(say("user"), say("system"), say("assistant")), "messages.1", "bad_role_order"),
    (chat(say("user"), say("assistant"), say("user")), "messages.2", "bad_role_order"),
    (chat(say("user", weight=1), say("assistant")), "messages.0.weight", "bad_weight"),
    (GOOD, None, "duplicate_row"),
]


@pytest.mark.parametrize(("row", "path", "code"), ODD_CHATS)
def test_an_odd_conversation_is_warned_about(row: Any, path: str | None, code: str) -> None:
    report = report_on(lines(GOOD, row))
    assert found(report) == [(2, path, code, "warning")]
    assert report.valid
    assert report.rows == 2


OTHERS: list[tuple[Any, Any, str | None, str, str]] = [
    (PAIR, {**PAIR, "rejected": None}, "rejected", "missing_field", "error"),
    (PAIR, {**PAIR, "rejected": 7}, "rejected", "wrong_type", "error"),
    (PAIR, {**PAIR, "rejected": PAIR["chosen"]}, "rejected", "identical_preference", "warning"),
    (PAIR, {**PAIR, "rejected": []}, "rejected", "empty_messages", "error"),
    (PAIR, {**PAIR, "chosen": [say("user")]}, "chosen.0.role", "bad_role", "error"),
    (
        PAIR,
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        "input.messages",
        "missing_field",
        "error",
    ),
    (
        PAIR,
        {
            "input": {"messages": [say("user")]},
            "preferred_output": [say("assistant", "a"), say("assistant", "b")],
            "non_preferred_output": [say("assistant", "c")],
        },
        "preferred_output",
        "bad_role_order",
        "error",
    ),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": CANARY},
        "completion",
        "missing_field",
        "error",
    ),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": CANARY, "completion": 7},
        "completion",
        "wrong_type",
        "error",
    ),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": CANARY, "completion": " "},
        "completion",
        "no_trainable_tokens",
        "warning",
    ),
    ({"text": "a"}, {"prompt": CANARY, "completion": "x"}, None, "mixed_formats", "error"),
    ({"text": "a"}, {"text": [CANARY]}, "text", "wrong_type", "error"),
    ({"text": "a", "label": 1}, {"text": CANARY}, "label", "missing_field", "error"),
    ({"text": "a", "label": 1}, {"text": CANARY, "label": ""}, "label", "missing_field", "error"),
    ({"text": "a", "label": 1}, {"text": CANARY, "label": 1.5}, "label", "wrong_type", "error"),
    ({"text": "a", "label": 1}, {"text": "b", "label": True}, "label", "wrong_type", "error"),
    ({"text": "a", "label": 1}, {"text": "b", "labels": ["x"]}, "labels", "wrong_type", "error"),
    ({"text": "a", "label": 1}, {"text": "b", "label": "x" * 257}, "label", "wrong_type", "error"),
]


@pytest.mark.parametrize(("good", "row", "path", "code", "severity"), OTHERS)
def test_other_formats_name_line_path_and_code(
    good: Any, row: Any, path: str | None, code: str, severity: str
) -> None:
    report = report_on(lines(good, row))
    assert found(report)[0] == (2, path, code, severity)
    assert report.valid is (severity == "warning")
    assert CANARY not in json.dumps(report.as_json())


def test_two_formats_in_one_row_are_refused() -> None:
    report = report_on(lines({**GOOD, "prompt": CANARY, "completion": CANARY}))
    assert found(report)[0] == (1, None, "mixed_formats", "error")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"{}\n"])
def test_a_file_without_rows_is_refused(data: bytes) -> None:
    report = report_on(data)
    assert not report.valid
    assert report.problems[-1]["code"] == "too_few_examples"
    assert report.problems[-1]["severity"] == "error"


@pytest.mark.parametrize(("rows", "few"), [(9, True), (10, False)])
def test_fewer_than_ten_rows_are_warned_about(rows: int, few: bool) -> None:
    report = report_on(lines(*[{"text": str(i)} for i in range(rows)]))
    assert report.valid
    assert ("too_few_examples" in report.problem_counts) is few


def test_a_file_in_which_nothing_is_learnt_is_refused() -> None:
    silent = [chat(say("user", str(i)), say("assistant", weight=0)) for i in range(12)]
    report = report_on(lines(*silent))
    assert not report.valid
    assert report.problems[-1]["line"] is None
    assert report.problems[-1]["code"] == "no_trainable_tokens"
    assert report_on(lines(*silent, GOOD)).valid


def test_blank_lines_and_a_byte_order_mark_are_noted_and_counted_as_lines() -> None:
    data = read.BOM + lines(GOOD, b"", b"  \t", b"oops", b"\r")
    report = report_on(data)
    assert found(report) == [
        (2, None, "blank_line", "note"),
        (4, None, "bad_json", "error"),
        (1, None, "utf8_bom", "note"),
    ]
    assert report.problem_counts["blank_line"] == 3
    assert report.rows == 1
    assert report_on(read.BOM + lines(GOOD, b"")).valid


def test_windows_line_ends_and_a_missing_last_one_are_fine() -> None:
    data = lines({"text": "a"}, {"text": "b"}).replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    assert report_on(data).rows == 2


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_pieces_of_any_size_say_the_same(step: int, suffix: str) -> None:
    data = read.BOM + lines(GOOD, b"", b"oops", {"text": 1}, chat())[:-1]
    packed = gzip.compress(data) if suffix == ".jsonl.gz" else data
    expected = report_on(data, step=1 << 20)
    assert report_on(packed, suffix, step=step) == expected
    assert [problem["line"] for problem in expected.problems if problem["line"]] == [2, 3, 4, 5, 1]


def test_a_hundred_problems_are_shown_and_all_are_counted() -> None:
    kinds: list[Any] = [b"oops", b"[]", {"text": "x"}, chat(), chat(say("nobody")), {CANARY: 1}]
    report = report_on(lines(GOOD, *[kind for kind in kinds for _ in range(300)]))
    shown = [problem["code"] for problem in report.problems]
    assert shown == [
        code
        for code in ("bad_json", "not_object", "mixed_formats", "empty_messages")
        for _ in range(25)
    ]
    assert report.problem_counts["unknown_format"] == 300
    assert sum(report.problem_counts.values()) == 1801  # and one remark on the size of the file


def test_labels_are_strings_in_id_order() -> None:
    rows = [{"text": str(i), "label": label} for i, label in enumerate([10, 2, "2", 1, "-3"])]
    assert report_on(lines(*rows)).labels == ["-3", "1", "2", "10"]
    rows.append({"text": "x", "label": "b"})
    assert report_on(lines(*rows)).labels == ["-3", "1", "10", "2", "b"]


def test_features_are_counted() -> None:
    report = report_on(
        lines(
            GOOD,
            chat(
                say("system"),
                say("user"),
                say("assistant", weight=0),
                say("user"),
                say("assistant", weight=1),
            ),
            chat(
                say("user"), call(), say("tool", tool_call_id="c1"), say("assistant"), tools=[TOOL]
            ),
        )
    )
    assert report.valid
    assert report.features == {"multi_turn": 2, "system": 1, "tools": 1, "weights": 1}


def test_a_report_survives_json() -> None:
    report = report_on(lines(GOOD, b"oops"))
    assert Report.from_json(json.loads(json.dumps(report.as_json()))) == report


# Attacks


def peak_of(feed: Any) -> tuple[Report, int]:
    tracemalloc.start()
    try:
        report = feed()
        return report, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_of_100_mb_is_skipped_with_flat_memory() -> None:
    def feed() -> Report:
        validator = Validator(".jsonl")
        validator.feed(lines(GOOD) + b'{"messages": "')
        piece = b"x" * (1 << 16)
        for _ in range(100 * 16):
            validator.feed(piece)
        validator.feed(b'"}\n' + lines({**GOOD, "tools": [TOOL]}, b"oops"))
        return validator.finish()

    report, peak = peak_of(feed)
    assert found(report) == [(2, None, "too_long", "error"), (4, None, "bad_json", "error")]
    assert report.rows == 2
    assert peak < 8 << 20


def test_a_gzip_bomb_stops_early_with_flat_memory() -> None:
    packer = zlib.compressobj(wbits=31)
    block = b" " * (1 << 20)
    bomb = packer.compress(lines(GOOD))
    bomb += b"".join(packer.compress(block) for _ in range(1 << 10)) + packer.flush()
    assert len(bomb) < 2 << 20  # a gibibyte

    report, peak = peak_of(lambda: report_on(bomb, ".jsonl.gz"))
    assert found(report) == [(2, None, "bad_compression", "error")]
    assert report.rows == 1
    assert peak < 8 << 20


def test_unpacked_data_has_an_absolute_cap() -> None:
    rows = lines(*[{"text": str(i) * 50} for i in range(100)])
    report = report_on(gzip.compress(rows), ".jsonl.gz", limits=Limits(unpacked_bytes=1000))
    assert "bad_compression" in report.problem_counts


@pytest.mark.parametrize("cut", [1, 5, 30, -1, -9])
def test_truncated_gzip_is_refused_at_its_line(cut: int) -> None:
    packed = gzip.compress(lines(*[{"text": f"{i} {CANARY}"} for i in range(5)]))
    report = report_on(packed[:cut], ".jsonl.gz")
    assert not report.valid
    assert found(report)[-1][2] == "bad_compression"
    assert found(report)[-1][0] == report.rows + 1


def test_damaged_gzip_and_what_follows_it_are_refused() -> None:
    packed = gzip.compress(lines(GOOD))
    assert report_on(packed + b"\0" * 100, ".jsonl.gz").valid  # padding
    two = report_on(packed + gzip.compress(lines({**GOOD, "tools": []})), ".jsonl.gz")
    assert two.valid
    assert "bad_compression" in report_on(packed + b"more", ".jsonl.gz").problem_counts
    assert "bad_compression" in report_on(lines(GOOD), ".jsonl.gz").problem_counts


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gzip.compress(b"x", mtime=0), "gzip"),  # a parameter: the same in every test process
        (b"PAR1\x15\x04\n", "Parquet"),
        (lines(GOOD).decode().encode("utf-16"), "UTF-16"),
        (b"[\n" + lines(GOOD), "array"),
    ],
)
def test_another_kind_of_file_is_recognised(data: bytes, says: str) -> None:
    report = report_on(data + b"\n")
    assert report.problems[0]["line"] == 1
    assert says in report.problems[0]["message"]


def test_lines_have_a_cap() -> None:
    report = report_on(b"\n" * 100, limits=Limits(lines=10))
    assert (11, None, "too_long", "error") in found(report)


def test_too_many_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.data.validate.LABELS_LIMIT", 3)
    report = report_on(lines(*[{"text": str(i), "label": i} for i in range(9)]))
    assert found(report) == [(4, None, "too_many_labels", "error")]
    assert report.labels == ["0", "1", "2"]


# CSV and Parquet


def csv_report(tmp_path: Path, text: str | bytes) -> Report:
    path = tmp_path / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return validate(path, ".csv")


def test_csv_lines_are_where_records_begin(tmp_path: Path) -> None:
    report = csv_report(
        tmp_path, 'text,label\r\n"one\r\n\r\nstill one",a\r\ntwo,\r\nthree,b,c\r\nfour,b\r\n'
    )
    assert found(report) == [(5, "label", "missing_field", "error"), (6, None, "bad_csv", "error")]
    assert report.rows == 2
    assert report.labels == ["a", "b"]


def test_csv_cells_may_hold_conversations(tmp_path: Path) -> None:
    cell = json.dumps(GOOD["messages"]).replace('"', '""')
    report = csv_report(tmp_path, f'messages,tools\n"{cell}",\n"[oops",\n')
    assert report.format == "chat"
    assert report.rows == 1
    assert found(report) == [(3, None, "bad_json", "error")]


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        ('text\nfine\n"never ends ' + CANARY, 3, "bad_csv"),
        ('text\n"a"b\n', 2, "bad_csv"),
        ("text,text\na,b\n", 1, "bad_csv"),
        (b"text\nfine\n\xff\n", 3, "not_utf8"),
        ("text\na\0b\n", 2, "wrong_type"),
        ("text\n" + "x" * (2 << 20) + "\n", 2, "too_long"),
        ('text\n"' + "x\n" * (1 << 20) + '"\n', 2, "too_long"),
        (f"{CANARY},b\n1,2\n", 2, "unknown_format"),
    ],
)
def test_bad_csv_is_named_by_line(tmp_path: Path, text: str | bytes, line: int, code: str) -> None:
    report = csv_report(tmp_path, text)
    assert found(report)[0] == (line, None, code, "error")
    assert CANARY not in json.dumps(report.as_json())


def test_csv_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    report = csv_report(tmp_path, "\ufefftext,label\na,1\n")
    assert report.valid
    assert report.format == "classification"
    assert report.problem_counts["utf8_bom"] == 1


def parquet(path: Path, rows: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_rows_are_counted_from_one(tmp_path: Path) -> None:
    rows = [
        GOOD,
        chat(say("user", name="x"), say("assistant", "ho", weight=0)),
        chat(say("nobody")),
        {"messages": None},
    ]
    report = validate(parquet(tmp_path / "d.parquet", rows), ".parquet")
    assert found(report) == [
        (2, "messages", "no_trainable_tokens", "warning"),
        (3, "messages.0.role", "bad_role", "error"),
        (4, "messages", "missing_field", "error"),
    ]


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "d.parquet", [{"text": CANARY * i} for i in range(500)])
    data = whole.read_bytes()
    for bad in (b"", b"PAR1", data[:-20], data[20:], data[:50] + b"\xff" * 500 + data[550:]):
        whole.write_bytes(bad)
        report = validate(whole, ".parquet")
        assert not report.valid
        assert "bad_parquet" in report.problem_counts
        assert CANARY not in json.dumps(report.as_json())


def test_a_parquet_row_group_has_a_cap(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", [{"text": str(i) * 99} for i in range(100)])
    report = validate(path, ".parquet", Limits(group_bytes=1000))
    assert found(report)[0] == (1, None, "bad_parquet", "error")


def test_the_program_prints_the_report(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", [{"text": "x"}])
    done = subprocess.run(
        [sys.executable, "-m", "tunery.data.validate", str(path), ".parquet"],
        capture_output=True,
        check=True,
    )
    assert Report.from_json(json.loads(done.stdout)) == validate(path, ".parquet")


# Sameness


def test_overlap_names_the_validation_lines() -> None:
    training = [(i, {"text": f"t{i}", "source": "a"}) for i in range(1, 20)]
    validation = [
        (1, {"text": "new"}),
        (4, {"text": "t7", "source": "b"}),
        (5, {"text": "t7"}),
        (9, {"text": "t1"}),
    ]
    report = overlap(training, validation, "text")
    assert found(report) == [(line, None, "train_valid_overlap", "warning") for line in (4, 5, 9)]
    assert "line 7" in report.problems[0]["message"]
    assert report.problem_counts == {"train_valid_overlap": 3}
    assert overlap(training, validation[:1], "text").problem_counts == {}


def test_a_duplicate_is_one_however_it_is_spelled() -> None:
    report = report_on(
        lines(
            {"prompt": "q", "chosen": "a", "rejected": "b", "id": 1},
            {
                "non_preferred_output": [{"content": "b", "role": "assistant"}],
                "input": {"messages": [say("user", [{"type": "text", "text": "q"}])]},
                "preferred_output": [say("assistant", "a")],
            },
        )
    )
    assert found(report) == [(2, None, "duplicate_row", "warning")]


@given(st.lists(st.integers(1, 60), max_size=300), st.integers(1, 50))
def test_digests_remember_the_first_line_of_each(keys: list[int], most: int) -> None:
    digests, model = Digests(most), dict[int, int]()
    for line, key in enumerate(keys, start=1):
        assert digests.add(key << 58 | key, line) == model.get(key)
        if len(model) < most:
            model.setdefault(key, line)


def test_many_digests_are_remembered() -> None:
    digests = Digests()
    assert all(digests.add(hash(str(i)) % 2**64 or 1, i) is None for i in range(20_000))
    assert all(digests.get(hash(str(i)) % 2**64 or 1) == i for i in range(20_000))


# Fuzz

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        [CANARY, "", "user", "assistant", "tool", "system", "\0", "\ud800", f'{{"{CANARY}": 1}}']
    )
)
keys = st.sampled_from(
    [
        "messages", "role", "content", "weight", "tools", "tool_calls", "function", "name",
        "arguments", "tool_call_id", "prompt", "completion", "chosen", "rejected", "input",
        "preferred_output", "non_preferred_output", "text", "label", "labels", "type", CANARY,
    ]
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(keys, below, max_size=5),
    max_leaves=25,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", CANARY])},
        optional={
            "content": values,
            "weight": values,
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {"function": st.fixed_dictionaries({"name": scalars, "arguments": values})},
                    optional={"id": scalars},
                )
                | values,
                max_size=2,
            ),
            "tool_call_id": scalars,
        },
    )
    | values,
    max_size=5,
)
rows = (
    st.fixed_dictionaries({"messages": messages}, optional={"tools": values})
    | st.fixed_dictionaries(
        {"prompt": values | messages, "chosen": messages | values, "rejected": messages | values}
    )
    | st.fixed_dictionaries(
        {
            "input": st.fixed_dictionaries({"messages": messages}) | values,
            "preferred_output": messages,
            "non_preferred_output": messages,
        }
    )
    | st.fixed_dictionaries({"text": values, "label": values})
    | values
)


def check_never_quotes(data: bytes, packed: bool = False) -> Report:
    sent, suffix = (gzip.compress(data), ".jsonl.gz") if packed else (data, ".jsonl")
    report = report_on(sent, suffix, step=64)
    document = report.as_json()
    labels = document.pop("labels") or []
    text = json.dumps(document, allow_nan=False)  # what a database takes
    assert CANARY not in text
    assert all(label.encode() and "\0" not in label for label in labels)
    count = data.count(b"\n") + 1
    assert all(
        problem["line"] is None or 1 <= problem["line"] <= count + 1 for problem in report.problems
    )
    return report


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, max_size=6))
def test_no_rows_crash_it_or_are_quoted(found_rows: list[Any]) -> None:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in found_rows)
    report = check_never_quotes(data)
    assert report.rows <= len(found_rows)
    assert check_never_quotes(data, packed=True).problem_counts == (report.problem_counts)


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, max_size=4), st.data())
def test_no_damage_crashes_it(found_rows: list[Any], draw: st.DataObject) -> None:
    data = bytearray(b"".join(json.dumps(row).encode() + b"\n" for row in found_rows))
    for _ in range(draw.draw(st.integers(0, 4))):
        at = draw.draw(st.integers(0, len(data)))
        data[at : at + draw.draw(st.integers(0, 3))] = draw.draw(st.binary(max_size=3))
    # A canary that damage turned into a key or a label is still never quoted.
    check_never_quotes(bytes(data))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".jsonl.gz", ".csv", ".parquet"]))
def test_no_bytes_crash_it(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    json.dumps(validate(path, suffix).as_json(), allow_nan=False)
