"""The catalogue's page says what the catalogue holds."""

from pathlib import Path

import pytest

from scripts import catalogue_reference
from tunery import catalogue

PAGE = Path(__file__).parents[2] / "docs" / "catalogue.md"
AGAIN = "run: python -m scripts.catalogue_reference > docs/catalogue.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == catalogue_reference.page(), AGAIN


@pytest.mark.parametrize("shelf", catalogue.SHELVES)
def test_every_entry_of_a_shelf_has_a_row(shelf: str) -> None:
    text = catalogue_reference.section(shelf)
    assert shelf in catalogue_reference.SAYINGS
    for name in catalogue.entries(shelf):  # type: ignore[arg-type]
        assert f"\n| `{name}` | **" in text


def test_a_row_says_what_an_entry_works_with() -> None:
    row = next(row for row in catalogue_reference.rows("methods") if row.startswith("| `dpo`"))
    assert "tasks: text-generation; formats: preference; a row: `{" in row
    assert "arXiv 2305.18290" in row
