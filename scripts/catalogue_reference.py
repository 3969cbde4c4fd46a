"""Print `docs/catalogue.md`, made from the catalogue.

    python -m scripts.catalogue_reference > docs/catalogue.md

`tests/docs/test_catalogue.py` holds the page to the catalogue.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from tunery import catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator

INTRODUCTION = """\
<!-- Made by `python -m scripts.catalogue_reference > docs/catalogue.md`; do not edit. -->

# The catalogue

Every entry is a name that a request may use, and one module of ours or of a package of yours.
`GET /v1/fine_tuning/catalogue` and `tunery methods ls` say the same of a running service, with each
entry's settings; `tunery methods show NAME` prints them.
"""

SAYINGS = {
    "adapters": "WHICH parameters train: `method.<type>.adapter.type`.",
    "methods": "HOW training goes: `method.type`.",
    "tasks": "WHAT the model does and is measured by: `ext.task`; else what the data asks for.",
    "transforms": "What is done to rows first: `ext.transforms`.",
    "rewards": "What reinforcement rewards: `method.<type>.hyperparameters` name them.",
}


def page() -> str:
    """The whole page, as Markdown."""
    return INTRODUCTION + "".join(section(shelf) for shelf in catalogue.SHELVES)


def section(shelf: Any) -> str:
    """A shelf's table, then what a request says of each entry."""
    head = f"\n## {shelf.capitalize()}\n\n{SAYINGS.get(shelf, '')}\n\n"
    table = "| Name | What it is | Works with | Paper |\n| --- | --- | --- | --- |\n"
    return head + table + "\n".join(rows(shelf)) + "\n"


def rows(shelf: Any) -> Iterator[str]:
    """One table row for each entry, by name."""
    for name in catalogue.entries(shelf):
        about = catalogue.describe(shelf, name)
        cells = (
            f"`{name}`",
            f"**{about['title']}**. {about['summary']}",
            works_with(about),
            about["paper"] or "",
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def works_with(about: dict[str, Any]) -> str:
    """Formats, tasks and methods that an entry is limited to; what is not named is not limited."""
    parts = [f"{kind}: {', '.join(names)}" for kind, names in about["works_with"].items()]
    if about["example_row"] is not None:
        row = json.dumps(about["example_row"], ensure_ascii=False)
        parts.append(f"a row: `{row}`")
    return "; ".join(parts) or "everything"


if __name__ == "__main__":
    sys.stdout.write(page())
