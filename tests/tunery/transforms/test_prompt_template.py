"""Rows into prompts: what comes out, and what a template may not do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunery.errors import InvalidData
from tunery.transforms.prompt_template import PromptTemplate, PromptTemplateConfig

ROWS = [{"text": "win a {prize}", "label": "spam"}, {"text": "see you", "label": "ham"}]


def run(rows=ROWS, **config):
    config.setdefault("completion", "x")
    return PromptTemplate().apply(PromptTemplateConfig(**config), rows, None)


def test_the_example_turns_labels_into_words() -> None:
    example = {k: v for k, v in PromptTemplate.example.items() if k != "type"}
    assert run(**example) == [
        {"prompt": "Message: win a {prize}\nSpam?", "completion": " yes"},
        {"prompt": "Message: see you\nSpam?", "completion": " no"},
    ]


def test_chat_output_has_system_user_and_assistant() -> None:
    config = {"prompt": "{text}", "completion": "{label}", "system": "Sort.", "syntax": "format"}
    assert run(**config, output="chat")[1] == {
        "messages": [
            {"role": "system", "content": "Sort."},
            {"role": "user", "content": "see you"},
            {"role": "assistant", "content": "ham"},
        ]
    }


def test_doubled_braces_are_braces_and_values_are_not_read_again() -> None:
    rows = run(prompt='{{"t": {text}}}', completion="{label_word}", syntax="format")
    assert rows[0] == {"prompt": '{"t": win a {prize}}', "completion": "spam"}


@given(st.text(), st.text())
def test_format_places_values_exactly(prefix: str, value: str) -> None:
    safe = prefix.replace("{", "{{").replace("}", "}}")
    row = {"text": value}
    (out,) = run([row], prompt=safe + "{text}", syntax="format")
    assert out["prompt"] == prefix + value


def test_rows_and_their_values_stay_as_they_were() -> None:
    row = {"text": ["a"]}
    run([row], prompt="{{ text | join }}")
    assert row == {"text": ["a"]}


@pytest.mark.parametrize(
    ("syntax", "prompt"),
    [
        ("format", "{text.__class__}"),
        ("format", "{text[0]}"),
        ("format", "{text:>999999999}"),
        ("format", "{}"),
        ("format", "lone { brace"),
        ("jinja", "{% if %}"),
        ("jinja", "{% include 'other' %}"),
        ("jinja", "{% import 'other' as o %}"),
        ("jinja", "x" * 70_000),
    ],
)
def test_templates_that_cannot_be_allowed_are_refused_at_submit(syntax, prompt) -> None:
    with pytest.raises(ValidationError, match="prompt: "):
        PromptTemplateConfig(prompt=prompt, completion="x", syntax=syntax)


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ text.append('x') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ nothing_of_that_name }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_reaches_further_is_stopped(prompt) -> None:
    with pytest.raises(InvalidData, match="row 1: the template") as caught:
        run([{"text": ["a"]}], prompt=prompt)
    assert caught.value.code == "template_error"


def test_a_missing_field_names_the_row_and_never_quotes_it() -> None:
    with pytest.raises(InvalidData) as caught:
        run([{"text": "secret"}], prompt="{body}", syntax="format")
    assert (
        caught.value.message
        == "prompt_template, row 1: the template asks for 'body'; the row has text"
    )


def test_a_label_without_a_word_is_refused_and_not_quoted() -> None:
    with pytest.raises(InvalidData, match="row 2: the verbalizer has 1 labels") as caught:
        run(prompt="{{ text }}", completion="{{ label_word }}", verbalizer={"spam": "yes"})
    assert "ham" not in caught.value.message


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="two labels share one word"):
        PromptTemplateConfig(prompt="p", completion="c", verbalizer={"a": "x", "b": "x"})
    with pytest.raises(ValidationError, match="needs output 'chat'"):
        PromptTemplateConfig(prompt="p", completion="c", system="s")
