"""What a figure is: what is compared with what, and the bound we hold ourselves to.

Each module of this package that measures something names its figures in `FIGURES`.
"""

from __future__ import annotations

import importlib
import operator
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["ratio", "difference", "value"]
_COMBINE: dict[Kind, Callable[[float, float], float]] = {
    "ratio": operator.truediv,
    "difference": operator.sub,
    "value": lambda subject, baseline: subject,
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number with a bound. It compares two sides that were measured in turns.

    `subject` and `baseline` name the sides. A ratio is subject over baseline, whatever their unit
    is: where both are durations and ours is the baseline, a large ratio means that we are fast.
    """

    key: str
    what: str
    subject: str
    baseline: str
    unit: str
    command: str
    at_least: float | None = None
    at_most: float | None = None
    kind: Kind = "ratio"

    def combine(self, subject: float, baseline: float) -> float:
        """One round's figure."""
        return _COMBINE[self.kind](subject, baseline)

    def holds(self, value: float) -> bool:
        """Whether a measured figure is within its bound."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    @property
    def judged(self) -> bool:
        """Whether it has a bound; one without stands beside another that has."""
        return self.at_least is not None or self.at_most is not None

    @property
    def bound(self) -> str:
        """As the table prints it."""
        if not self.judged:
            return "not judged"
        suffix = "" if self.kind == "ratio" else f" {self.unit}"
        if self.at_least is not None:
            return f"≥ {self.at_least:g}{suffix}"
        return f"≤ {self.at_most:g}{suffix}"


def all_figures() -> list[Figure]:
    """Every module's figures, modules in the order of their names.

    Raises:
        ValueError: two figures have one key.
    """
    found: dict[str, Figure] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        figures = getattr(importlib.import_module(f"bench.{module.name}"), "FIGURES", ())
        for figure in figures:
            if figure.key in found:
                raise ValueError(f"two figures are called {figure.key}")
            found[figure.key] = figure
    return list(found.values())
