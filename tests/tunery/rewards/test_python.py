"""The sandbox: code that computes may, code that reaches out may not."""

import json
import time
from typing import Any

import pytest

from tunery.entries import Grade, Sample
from tunery.errors import InvalidConfig, NotSupported
from tunery.rewards import _sandbox
from tunery.rewards._grader import Grader

if _sandbox._unconfined() is not None:
    pytest.skip("this host has no seccomp", allow_module_level=True)


def graded(body: str, text: str = "7", item: dict[str, Any] | None = None, **more: Any) -> Grade:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    source = f"def grade(sample, item):\n{lines}"
    grader = Grader.of({"type": "python", "source": source, **more})
    (grade,) = grader.grade([Sample(item or {}, text)])
    return grade


def test_it_sees_the_completion_and_the_row() -> None:
    item = {"answer": {"n": 7}}
    assert graded("return item['answer']['n'] / int(sample['output_text'])", item=item).reward == 1
    assert graded("return sample['output_json']['a']", '{"a": 0.25}').reward == 0.25
    assert graded("return sample['output_json'] is None", "no json").reward == 1.0


def test_computing_modules_can_be_imported() -> None:
    body = "import math, re, json, statistics\nreturn math.sqrt(len(re.findall('a', 'aaaa')))"
    assert graded(body).reward == 2.0


@pytest.mark.parametrize(
    "body",
    [
        "return len(open('/etc/passwd').read())",
        "import os\nreturn len(os.listdir('/'))",
        "import socket\nreturn 1",
        "import subprocess\nreturn 1",
        # Past our import, by the interpreter's own: the filter still stands.
        "m = ().__class__.__base__.__subclasses__()\n"
        "os = [c for c in m if c.__name__ == '_wrap_close'][0].__init__.__globals__\n"
        "return len(os['listdir']('/'))",
        "m = ().__class__.__base__.__subclasses__()\n"
        "os = [c for c in m if c.__name__ == '_wrap_close'][0].__init__.__globals__\n"
        "return os['fork']()",
        "m = ().__class__.__base__.__subclasses__()\n"
        "os = [c for c in m if c.__name__ == '_wrap_close'][0].__init__.__globals__\n"
        "return os['kill'](1, 0) or 1",
        "m = ().__class__.__base__.__subclasses__()\n"
        "sys = [c for c in m if c.__name__ == '_wrap_close'][0].__init__.__globals__['sys']\n"
        "libc = sys.modules['ctypes'].CDLL(None)\n"
        "return libc.socket(2, 1, 0) >= 0 or 1 / 0",
    ],
)
def test_nothing_outside_can_be_reached(body: str) -> None:
    grade = graded(body)
    assert grade.reward == 0.0
    assert grade.error is not None
    assert any(word in grade.error for word in ("Permission", "ImportError", "ZeroDivision"))


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_SECRET", "x")
    body = (
        "m = ().__class__.__base__.__subclasses__()\n"
        "os = [c for c in m if c.__name__ == '_wrap_close'][0].__init__.__globals__\n"
        "return len([k for k in os['environ'] if k.startswith('TUNERY')])"
    )
    assert graded(body) == Grade(0.0)


def test_one_sample_that_fails_leaves_the_others_alone() -> None:
    source = "def grade(sample, item):\n    return 1 / int(sample['output_text'])\n"
    grades = Grader.of({"type": "python", "source": source}).grade(
        [Sample({}, text) for text in ("2", "0", "x", "4")]
    )
    assert [grade.reward for grade in grades] == [0.5, 0.0, 0.0, 0.25]
    assert grades[1].error == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "body", ["return 'one'", "return None", "return float('nan')", "return 10 ** 12"]
)
def test_what_is_no_number_scores_nothing(body: str) -> None:
    assert graded(body) == Grade(0.0, error="grade returned no number")


def test_memory_is_bounded() -> None:
    assert graded("return len(bytearray(1 << 40))").reward == 0.0
    assert graded("x = []\nwhile True: x.append(bytes(1 << 20))").error == "out of memory"


def test_time_is_bounded() -> None:
    began = time.monotonic()
    grade = graded("while True: pass", timeout_s=0.5)
    assert grade == Grade(0.0, error="no answer within 0.5 s")
    assert time.monotonic() - began < 30


def test_a_call_that_never_ends_is_cut_short_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandbox, "ITEM_S", 1)
    source = (
        "def grade(sample, item):\n    while sample['output_text'] == 'loop': pass\n    return 1"
    )
    grades = Grader.of({"type": "python", "source": source}).grade(
        [Sample({}, "loop"), Sample({}, "go")]
    )
    assert grades == [Grade(0.0, error="it took more than 1 s"), Grade(1.0)]


def test_an_answer_of_its_own_making_is_not_taken_for_numbers() -> None:
    body = "import json\njson.codecs = None\nraise SystemExit"
    assert graded(body).error == "SystemExit: "


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def grade(sample, item)\n  return 1", "line 1: expected ':'"),
        ("def score(sample, item):\n  return 1", "defines no function grade"),
    ],
)
def test_source_that_cannot_be_a_grader_is_refused_at_once(source: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        Grader.of({"type": "python", "source": source})


def test_source_that_fails_when_it_is_run_is_the_callers_to_fix() -> None:
    grader = Grader.of({"type": "python", "source": "grade = missing"})
    with pytest.raises(InvalidConfig, match="NameError: name 'missing' is not defined"):
        grader.grade([Sample({}, "x")])


def test_a_host_without_a_sandbox_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandbox, "_unconfined", lambda: "no seccomp")
    with pytest.raises(NotSupported, match=r"this host has none \(no seccomp\)"):
        graded("return 1")


def test_large_requests_pass() -> None:
    text = json.dumps(["x" * 1000] * 500)
    assert graded("return len(sample['output_text'])", text).reward == len(text)
