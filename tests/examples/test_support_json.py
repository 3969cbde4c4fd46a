from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "support-json"


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("support_json_generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _committed(split: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("split", "count"), [("train", 320), ("validation", 48)])
def test_the_committed_rows_are_those_that_the_script_writes(split: str, count: int) -> None:
    rows = _committed(split)
    assert rows == _generator().rows(split)
    assert len(rows) == count
    assert len({row["messages"][1]["content"] for row in rows}) == count


def test_every_answer_is_strict_json_and_true_to_its_message() -> None:
    for row in _committed("train") + _committed("validation"):
        message, answer = (part["content"] for part in row["messages"][1:])
        fields = json.loads(answer)
        assert list(fields) == ["intent", "product", "urgency", "order_id"]
        assert fields["product"].replace("-", " ") in message.replace("-", " ")
        if fields["order_id"] is None:
            assert not any(character.isdigit() for character in message)
        else:
            assert fields["order_id"] in message


def test_no_held_out_phrasing_is_trained_on() -> None:
    generator = _generator()
    for table in (generator.PHRASINGS, generator.CUES):
        for key, (trained, held_out) in table.items():
            assert key == "normal" or not set(trained) & set(held_out)
