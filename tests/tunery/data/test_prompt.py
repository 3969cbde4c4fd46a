"""Prompts: rows that ask and do not answer, told apart from conversations."""

from typing import Any

import pytest

from tunery.data import formats
from tunery.data.formats import Finding

ASK = {"role": "user", "content": "2+2?"}
REPLY = {"role": "assistant", "content": "4"}


def name_of(row: dict[str, Any]) -> str:
    found = formats.detect(row)
    return found.code if isinstance(found, Finding) else found.name


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [ASK], "answer": "4"}, "prompt"),
        ({"messages": [{"role": "system", "content": "Be short."}, ASK]}, "prompt"),
        ({"messages": [ASK, REPLY]}, "chat"),
        ({"messages": [ASK, REPLY, ASK]}, "chat"),
        ({"prompt": "2+2=", "answer": "4"}, "prompt"),
        ({"prompt": [ASK], "answer": "4"}, "prompt"),
        ({"prompt": "2+2=", "completion": "4"}, "prompt_completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "2+2="}, "missing_field"),
    ],
)
def test_who_has_spoken_decides(row: dict[str, Any], name: str) -> None:
    assert name_of(row) == name


def test_other_columns_stay_for_the_grader() -> None:
    form = formats.find("prompt")
    row = {"prompt": [ASK], "answer": {"n": 4}, "empty": None}
    assert list(formats.check(row, form)) == []
    assert form.normal(row) == {"messages": [ASK], "answer": {"n": 4}}
    assert form.normal({"prompt": "2+2=", "answer": "4"}) == {"prompt": "2+2=", "answer": "4"}


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        ({"messages": [ASK, REPLY]}, "messages.1", "bad_role_order"),
        ({"messages": []}, "messages", "empty_messages"),
        ({"prompt": 7}, "prompt", "wrong_type"),
        ({"prompt": " "}, "prompt", "no_trainable_tokens"),
        ({"answer": "4"}, "messages", "missing_field"),
    ],
)
def test_what_is_wrong_is_named_by_path(row: dict[str, Any], path: str, code: str) -> None:
    (finding,) = formats.check(row, formats.find("prompt"))
    assert (finding.path, finding.code) == (path, code)
