"""OpenAI's `multi`: several graders, and a formula that makes one number of theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from tunery.entries import EntryConfig, Grade, Reward
from tunery.rewards import _grader
from tunery.rewards._expression import parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.entries import Sample
    from tunery.rewards._expression import Expression
    from tunery.rewards._grader import Grader


class MultiConfig(EntryConfig):
    graders: dict[str, _grader.GraderSettings] = Field(
        min_length=1,
        max_length=20,
        description="Name to grader, each {type, ...settings}; none of them `multi`.",
    )
    calculate_output: str = Field(
        min_length=1,
        description="Formula over the graders' names: + - * / ^, parentheses, min, max, abs, "
        "floor, ceil, exp, sqrt, log.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> MultiConfig:
        for name, given in self.graders.items():
            if not name.isidentifier():
                raise ValueError(f"graders: {name!r} cannot stand in a formula")
            if given["type"] == Multi.name:
                raise ValueError(f"graders.{name}: a multi grader holds no other one")
        unknown = sorted(parse(self.calculate_output).names - self.graders.keys())
        if unknown:
            raise ValueError(
                f"calculate_output: there is no grader {unknown[0]!r}; "
                f"known: {', '.join(self.graders)}"
            )
        return self


class Multi:
    name: ClassVar[str] = "multi"
    title: ClassVar[str] = "Several graders"
    summary: ClassVar[str] = "Combines graders by a formula."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = MultiConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "multi",
        "graders": {
            "right": {
                "type": "string_check",
                "operation": "ilike",
                "reference": "{{ item.reference }}",
            },
            "short": {"type": "regex", "pattern": "^.{1,40}$"},
        },
        "calculate_output": "right * (1 + 0.1 * short)",
    }

    def templates(self, config: MultiConfig) -> Sequence[str]:
        return [source for _, grader in _graders(config) for source in grader.templates()]

    def grade(self, config: MultiConfig, samples: Sequence[Sample]) -> list[Grade]:
        """The formula's value, with the single grades as `parts`; 0 where it has none."""
        formula = parse(config.calculate_output)
        graded = {name: grader.grade(samples) for name, grader in _graders(config)}
        return [
            _combined(formula, {name: grades[i] for name, grades in graded.items()})
            for i in range(len(samples))
        ]


def _graders(config: MultiConfig) -> list[tuple[str, Grader]]:
    return [(name, _grader.Grader.of(given)) for name, given in config.graders.items()]


def _combined(formula: Expression, grades: Mapping[str, Grade]) -> Grade:
    parts = {name: grade.reward for name, grade in grades.items()}
    errors = [f"{name}: {grade.error}" for name, grade in grades.items() if grade.error]
    known = {name: value for name, value in parts.items() if value is not None}
    if formula.names - known.keys():  # a part does not apply, so the whole does not
        return Grade(None, parts, "; ".join(errors) or None)
    try:
        return Grade(formula(known), parts, "; ".join(errors) or None)
    except ArithmeticError as error:
        return Grade(0.0, parts, "; ".join([*errors, f"calculate_output: {error}"]))


ENTRY: type[Reward] = Multi
