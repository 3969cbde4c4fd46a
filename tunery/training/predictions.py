"""What an evaluated model answered, row by row, as files beside its weights.

    predictions/valid.jsonl test.jsonl     and base_valid.jsonl, base_test.jsonl of the untuned base

One JSON object a line: `row`, the row's number in its file from 0, then what the task has to say.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tunery.training.types import Evaluated, TaskRuntime

FOLDER = "predictions"


def write_predictions(export: Path, seen: Mapping[str, Evaluated], task: TaskRuntime) -> None:
    """A file for each evaluation that the task has rows for.

    Args:
        seen: by what was evaluated, such as "valid".
    """
    for name, evaluated in seen.items():
        lines = [
            json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            for row in task.predictions(evaluated)
        ]
        if lines:
            (export / FOLDER).mkdir(exist_ok=True)
            (export / FOLDER / f"{name}.jsonl").write_text("".join(lines), "utf-8")
