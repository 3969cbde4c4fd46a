"""The configuration page says what the code reads."""

from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from core.settings import Settings
from scripts import settings_reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
AGAIN = "run: python -m scripts.settings_reference > docs/configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_reference.page(), AGAIN


def test_every_setting_has_a_row_with_a_description() -> None:
    rows = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    assert len(rows) == len(Settings.model_fields)
    for row in rows:
        assert len(row.rsplit("|", 2)[1].strip()) > 10, row


def test_a_row_tells_type_limits_and_default() -> None:
    row = next(row for row in settings_reference.rows() if "TUNERY_PORT`" in row)
    assert "| integer ≥ 0, ≤ 65535 | `8300` |" in row


def test_a_secret_is_called_one_and_an_unset_default_is_named() -> None:
    field = FieldInfo.from_annotated_attribute(SecretStr | None, None)
    assert settings_reference.kind(field) == "secret"
    assert settings_reference.default(field) == "unset"
