"""What a base model's tokenizer makes of a run's files, before the run: for dry runs.

A program of its own, `python -m tunery.training.inspection ORDER`: reads a `RunOrder`, prints one
JSON object. It loads no weights, and says nothing of what the rows contain.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import AppError, InvalidData
from tunery.training.preview import sampled
from tunery.training.program import PREFLIGHT_ROWS
from tunery.training.protocol import RunOrder

if TYPE_CHECKING:
    from tunery.spec import DataFile
    from tunery.training.preflight import Finding
    from tunery.training.preview import Preview


def inspect(order: RunOrder, rows: int = PREFLIGHT_ROWS) -> dict[str, Any]:
    """`{preflight, problems, warnings}` of the first `rows` rows of each file.

    What would end the run is a problem. That nothing is learnt from the rows looked at is one only
    where they are the whole file.
    """
    data = order.spec.data
    found: dict[str, Any] = {"preflight": None, "problems": [], "warnings": []}
    for name, file, path in (
        ("training_file", data.training, order.training_path),
        ("validation_file", data.validation, order.validation_path),
    ):
        if file is None or path is None:
            continue
        try:
            looked = sampled(
                order.spec, file, Path(path), Path(order.base_model_path), sample=rows, show=0
            )
            _judge(looked, name, file, rows, found)
        except AppError as error:
            found["problems"].append(
                {"code": error.code, "path": name, "message": error.message, "severity": "error"}
            )
            continue
        if name == "training_file":
            found["preflight"] = looked.preflight.model_dump(mode="json")
    return found


def _judge(
    looked: Preview, name: str, file: DataFile, rows: int, found: dict[str, list[Any]]
) -> None:
    for problem in looked.problems:
        found["problems"].append(
            {"path": name, "severity": "error", **problem.model_dump(mode="json")}
        )
    if name == "validation_file":
        if file.rows <= rows and not looked.preflight.trained_tokens and _speaks(looked):
            raise InvalidData(
                "no token of the validation file would be learnt", code="invalid_validation_file"
            )
        return
    refusal = looked.preflight.refusal
    for finding in looked.preflight.findings:
        ends = finding is refusal and file.rows <= rows
        found["problems" if ends else "warnings"].append(_told(finding, name, ends))


def _speaks(looked: Preview) -> bool:
    """Whether tokens are what is learnt."""
    return looked.preflight.trained_share is not None


def _told(finding: Finding, name: str, ends: bool) -> dict[str, Any]:
    told = finding.model_dump(mode="json")
    return {**told, "path": name, "severity": "error" if ends else "warning"}


def main(argv: list[str]) -> int:
    """Print what is found; returns the exit code."""
    order = RunOrder.model_validate_json(Path(argv[0]).read_bytes())
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is not the answer
        found = inspect(order)
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
