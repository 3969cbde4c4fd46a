"""OpenAI's `python` grader: a function of one's own, run where it can do no harm."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from tunery.entries import EntryConfig, Grade, Reward
from tunery.rewards import _sandbox

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.entries import Sample

MAX_CHARS = 256 << 10


class PythonConfig(EntryConfig):
    source: str = Field(
        min_length=1,
        max_length=MAX_CHARS,
        description="Defines grade(sample, item) -> float. `sample` has output_text and, where the "
        "text is JSON, output_json; `item` is the row. The standard library's computing modules "
        "can be imported; there are no files, no network and no environment.",
    )
    timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds for all completions of one step together."
    )

    @field_validator("source")
    @classmethod
    def _parses(cls, source: str) -> str:
        try:
            compile(source, "<grader>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            where = f"line {line}: " if line else ""
            raise ValueError(f"{where}{getattr(error, 'msg', None) or error}") from error
        if "grade" not in source:
            raise ValueError("it defines no function grade(sample, item)")
        return source


class Python:
    name: ClassVar[str] = "python"
    title: ClassVar[str] = "Python function"
    summary: ClassVar[str] = "Grades by a function of one's own, in a sandboxed process."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = PythonConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "python",
        "source": "def grade(sample, item):\n"
        "    return float(sample['output_text'].strip() == item['reference'])\n",
    }

    def templates(self, config: PythonConfig) -> Sequence[str]:
        return ()

    def grade(self, config: PythonConfig, samples: Sequence[Sample]) -> list[Grade]:
        """What the function returns for each sample; 0 with the reason where it fails.

        Raises:
            NotSupported: this host has no sandbox.
            InvalidConfig: the source cannot be run.
        """
        calls = [(_shown(sample), dict(sample.item)) for sample in samples]
        try:
            results = _sandbox.grade(config.source, calls, timeout_s=config.timeout_s)
        except _sandbox.SandboxFailed as error:
            return [Grade(0.0, error=str(error)) for _ in samples]
        return [
            Grade(0.0, error=result["error"]) if isinstance(result, dict) else Grade(result)
            for result in results
        ]


def _shown(sample: Sample) -> dict[str, Any]:
    shown: dict[str, Any] = {"output_text": sample.output_text}
    try:
        shown["output_json"] = json.loads(sample.output_text)
    except (ValueError, RecursionError):
        shown["output_json"] = None
    return shown


ENTRY: type[Reward] = Python
