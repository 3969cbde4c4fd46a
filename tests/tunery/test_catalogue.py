"""The catalogue as a whole: no torch, no two entries of one name, helpful misses."""

import subprocess
import sys
from typing import Any

import pytest

from tunery import catalogue
from tunery.errors import InvalidConfig

WHOLE = """
import json, sys
from tunery import catalogue
for shelf in catalogue.SHELVES:
    for name in catalogue.entries(shelf):
        json.dumps(catalogue.describe(shelf, name))
heavy = {"torch", "transformers", "peft", "deepspeed", "accelerate", "numpy"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_the_whole_catalogue_is_read_without_torch() -> None:
    out = subprocess.run([sys.executable, "-c", WHOLE], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


EVERY = [(shelf, name) for shelf in catalogue.SHELVES for name in catalogue.entries(shelf)]


@pytest.mark.parametrize(("shelf", "name"), EVERY)
def test_every_example_is_valid_for_its_schema(shelf: Any, name: str) -> None:
    entry = catalogue.find(shelf, name)
    settings = dict(entry.example)
    if shelf == "methods":
        # A method's example is `{"type": name, name: {"hyperparameters": {...}}}`.
        assert settings.pop("type") == name
        settings = settings.pop(name).get("hyperparameters", {})
    elif shelf == "tasks":
        settings = settings if isinstance(settings, dict) else {}
        settings.pop("type", None)
    else:
        assert settings.pop("type") == name
    entry.Config.model_validate(settings)


@pytest.mark.parametrize(("shelf", "name"), EVERY)
def test_every_setting_is_described(shelf: Any, name: str) -> None:
    properties = catalogue.describe(shelf, name)["schema"].get("properties", {})
    assert [key for key, value in properties.items() if not value.get("description")] == []


def test_an_entry_from_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "plain")
    assert "plain" in catalogue.entries("adapters")


def test_two_entries_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "lora")
    with pytest.raises(RuntimeError, match="two entries of adapters are named 'lora'"):
        catalogue.entries("adapters")


@pytest.fixture(autouse=True)
def _fresh_shelves() -> Any:
    yield
    catalogue.entries.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if an installed package offered an adapter of that name by entry point."""
    own = type("Own", (type(catalogue.find("adapters", "full")),), {"name": name})
    point = type("Point", (), {"load": lambda self: own})()
    catalogue.entries.cache_clear()
    monkeypatch.setattr(
        catalogue, "entry_points", lambda group: [point] if group == "tunery.adapters" else []
    )


@pytest.mark.parametrize(
    ("shelf", "wrong", "near", "code"),
    [
        ("adapters", "lorra", "lora", "invalid_value"),
        ("transforms", "chat-template", "chat_template", "invalid_value"),
    ],
)
def test_a_miss_names_the_nearest_entry(shelf: Any, wrong: str, near: str, code: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        catalogue.find(shelf, wrong, "where.it.stands")
    assert caught.value.code == code
    assert caught.value.param == "where.it.stands"
    assert f"did you mean {near!r}?" in (caught.value.hint or "")


def test_a_name_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(InvalidConfig) as caught:
        catalogue.find("adapters", "zzzzzz")
    hint = caught.value.hint or ""
    assert hint.startswith("known: ")
    assert "ia3" in hint
