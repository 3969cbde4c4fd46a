"""Templates of graders: paths, and what is said of those that lead nowhere."""

import pytest
from pydantic import ValidationError

from tunery.entries import Sample
from tunery.errors import InvalidData
from tunery.rewards._template import SampleError, check_item, check_template, render
from tunery.rewards.string_check import StringCheckConfig

ITEM = {"answer": "Paris", "meta": {"scores": [0.5, 2]}, "n": 7}


def shown(source: str, text: str = "Paris") -> str:
    return render(check_template(source), Sample(ITEM, text))


def test_texts_stand_as_they_are_and_all_else_as_json() -> None:
    assert shown("<{{ item.answer }}> {{item.n}} {{ item.meta }}") == (
        '<Paris> 7 {"scores": [0.5, 2]}'
    )


@pytest.mark.parametrize("source", ["{{ item.meta.scores.1 }}", "{{ item.meta.scores[1] }}"])
def test_lists_are_reached_by_number(source: str) -> None:
    assert shown(source) == "2"


def test_the_completion_is_text_or_json() -> None:
    assert shown("{{ sample.output_text }}", '{"a": {"b": true}}') == '{"a": {"b": true}}'
    assert shown("{{ sample.output_json.a.b }}", '{"a": {"b": true}}') == "true"


def test_a_value_is_not_read_again() -> None:
    assert shown("{{ sample.output_text }}", "{{ item.answer }}") == "{{ item.answer }}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ answer }}", "begins with neither item nor sample"),
        ("{{ item }}", "names no field"),
        ("{{ sample.text }}", "output_text and output_json, no text"),
        ("{{ sample.output_text.a }}", "has no fields"),
        ("{{ item.answer | upper }}", "is not a path"),
        ("{{ item.__class__() }}", "is not a path"),
        ("{{ item.answer", "without its"),
        ("item.answer }}", "without its"),
    ],
)
def test_what_is_no_path_is_refused_when_the_grader_is_made(source: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StringCheckConfig(reference=source)


@pytest.mark.parametrize("path", ["item.gold", "item.answer.x", "item.meta.scores.9"])
def test_a_row_without_the_field_is_the_callers_to_fix(path: str) -> None:
    source = f"{{{{ {path} }}}}"
    for fails in (lambda: shown(source), lambda: check_item(source, ITEM)):
        with pytest.raises(InvalidData) as caught:
            fails()
        assert f"asks for {path}; the row has answer, meta, n" in caught.value.message
        assert caught.value.code == "template_error"


@pytest.mark.parametrize(
    ("text", "words"), [("no json", "is not JSON"), ('{"b": 1}', "has no a"), ("[" * 9999, "JSON")]
)
def test_a_completion_without_the_field_is_the_models_doing(text: str, words: str) -> None:
    with pytest.raises(SampleError, match=words):
        shown("{{ sample.output_json.a }}", text)
