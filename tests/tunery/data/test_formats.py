"""The shelf of formats: found by themselves, told apart by their columns and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tunery import catalogue
from tunery.data import formats
from tunery.data.formats import Finding, Format
from tunery.data.formats._base import as_it_is, check_strings
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`install(format)`: as if an installed package offered it by entry point."""

    def installed(form: Format) -> None:
        point = type("Point", (), {"load": lambda self: form})()
        monkeypatch.setattr(formats, "entry_points", lambda group: [point])
        formats.known.cache_clear()
        formats.json_columns.cache_clear()

    yield installed
    formats.known.cache_clear()
    formats.json_columns.cache_clear()


def form(name: str, *columns: str, **more: Any) -> Format:
    return Format(
        name=name,
        task="text-generation",
        spellings=(frozenset(columns),),
        check=check_strings(*columns),
        normal=as_it_is,
        content=columns,
        **more,
    )


def test_every_format_asks_for_a_task_that_reads_it() -> None:
    for name, found in formats.known().items():
        assert found.name == name
        assert name in catalogue.find("tasks", found.task).formats


def test_a_format_of_another_package_is_found_and_detected(install: Any) -> None:
    install(form("haiku", "first", "second", "third", json_columns=frozenset({"third"})))
    found = formats.detect({"first": "a", "second": "b", "third": "c"})
    assert isinstance(found, Format)
    assert found.name == "haiku"
    assert "third" in formats.json_columns()


def test_two_formats_of_one_name_are_an_error(install: Any) -> None:
    install(form("chat", "first"))
    with pytest.raises(RuntimeError, match="two formats are named 'chat'"):
        formats.known()


def test_values_decide_between_formats_of_the_same_columns(install: Any) -> None:
    install(form("odd", "text", claims=lambda row: row["text"] == "odd"))
    both = formats.detect({"text": "odd"})
    assert isinstance(both, Finding)
    assert both.code == "mixed_formats"
    plain = formats.detect({"text": "even"})
    assert isinstance(plain, Format)
    assert plain.name == "text"


def test_an_incomplete_row_is_taken_for_the_format_that_lacks_least() -> None:
    found = formats.detect({"prompt": "a"})
    assert isinstance(found, Finding)
    assert (found.code, found.path) == ("missing_field", "completion")
    assert found.message == "a prompt_completion row needs completion"


def test_a_miss_lists_what_there_is() -> None:
    with pytest.raises(InvalidConfig) as caught:
        formats.find("prose")
    assert "chat" in (caught.value.hint or "")
