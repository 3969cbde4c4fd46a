"""A reward and its settings, together: what a method is given and calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from tunery import catalogue
from tunery.errors import InvalidConfig, InvalidData
from tunery.rewards._template import check_item

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tunery.entries import EntryConfig, Grade, Reward, Sample


@dataclass(frozen=True, slots=True)
class Grader:
    """An entry of the rewards' shelf, configured.

    Attributes:
        name: what its metrics are called.
    """

    entry: Reward
    config: EntryConfig
    name: str

    @staticmethod
    def of(given: Mapping[str, Any], param: str = "grader") -> Grader:
        """From `{type, name?, ...settings}`.

        Raises:
            InvalidConfig: no such reward, or a setting of it is wrong; by path.
        """
        from tunery.request import validated

        kind, name = given.get("type"), given.get("name")
        if not isinstance(kind, str):
            raise InvalidConfig(
                f"{param}.type: the grader's type is required",
                code="missing_parameter",
                param=f"{param}.type",
            )
        entry = catalogue.find("rewards", kind, f"{param}.type")
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= 64):
            raise InvalidConfig(f"{param}.name: 1 to 64 characters", param=f"{param}.name")
        settings = {key: value for key, value in given.items() if key not in ("type", "name")}
        return Grader(entry, validated(entry.Config, settings, param), name or kind)

    def templates(self) -> Sequence[str]:
        """All templates that grading renders."""
        return self.entry.templates(self.config)

    def check(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Let rows pass that have what the templates ask of them.

        Raises:
            InvalidData: one has not; names the row by number, from 0, and the field.
        """
        sources = self.templates()
        for number, item in enumerate(items):
            try:
                for source in sources:
                    check_item(source, item)
            except InvalidData as error:
                raise InvalidData(
                    f"row {number}: {error.message}", code=error.code, hint=error.hint
                ) from error

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample, in order."""
        return self.entry.grade(self.config, samples)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The same settings, if they make a grader; pydantic wants a ValueError else."""
    try:
        Grader.of(given)
    except InvalidConfig as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise ValueError(f"{error.message}{hint}") from error
    return given


GraderSettings = Annotated[dict[str, Any], AfterValidator(_checked)]
"""`{type, name?, ...settings}` of an entry on the rewards' shelf, as a field of a `Config`."""
