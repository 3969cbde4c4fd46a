"""Which tokens are learnt, for templates with and without marks, told apart by eye."""

from __future__ import annotations

from typing import Any

import pytest

from tunery.errors import InvalidData
from tunery.training.collate import collate
from tunery.training.encoding import encode_row
from tunery.training.types import IGNORE, EncodeOptions, Example

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PICKY = (
    "{% if messages|length == 0 %}{{ raise_exception('empty') }}{% endif %}"
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no ' + m.role + ': ' + m.content) }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def options(format: str, **overrides: Any) -> EncodeOptions:
    return EncodeOptions(format=format, max_length=overrides.pop("max_length", 400), **overrides)


def learnt(example: Example, tokenizer: Any, document: int = 0) -> list[str]:
    """Runs of learnt tokens as text."""
    labels = example.documents[document].labels.tolist()
    runs: list[list[int]] = []
    before = IGNORE
    for label in labels:
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


def whole(example: Example, tokenizer: Any, document: int = 0) -> str:
    return str(tokenizer.decode(example.documents[document].input_ids))


def chat(*turns: str, **extra: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, **extra}


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_replies_and_their_stop_tokens_are_learnt(template: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(template)
    row = chat("Hi", "Hello!", "Bye", "See you.")
    example = encode_row(row, tokenizer, options("chat"), 0)
    assert learnt(example, tokenizer) == ["Hello!<|im_end|>", "See you.<|im_end|>"]
    assert whole(example, tokenizer).startswith("<|im_start|>user\nHi<|im_end|>\n")


def test_spans_agree_with_and_without_marks_on_odd_text(make_tokenizer: Any) -> None:
    row = chat("é\n\n", "  spaced  ", "assistant\n", "<b>assistant</b>\n", "日本", "🎉 ok")
    by_template = []
    for template in (CHATML, MARKED):
        tokenizer = make_tokenizer(template)
        by_template.append(encode_row(row, tokenizer, options("chat"), 0).documents[0])
    assert by_template[0].labels.tolist() == by_template[1].labels.tolist()
    assert by_template[0].supervised > 0


def test_the_same_words_said_by_both_are_told_apart(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    example = encode_row(chat("yes", "yes", "yes", "yes"), tokenizer, options("chat"), 0)
    assert learnt(example, tokenizer) == ["yes<|im_end|>", "yes<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_message_of_weight_zero_is_read_and_not_learnt(
    template: str, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(template)
    row = chat("Hi", "Bad.", "Again", "Good.")
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 1
    example = encode_row(row, tokenizer, options("chat"), 0)
    assert learnt(example, tokenizer) == ["Good.<|im_end|>"]
    assert "Bad." in whole(example, tokenizer)
    assert "weight" not in whole(example, tokenizer)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_message_of_half_weight_is_learnt_by_half(template: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(template)
    row = chat("Hi", "So so.", "Again", "Good.")
    row["messages"][1]["weight"] = 0.25
    document = encode_row(row, tokenizer, options("chat"), 0).documents[0]
    # "So so." and "Good." are bytes, each with a stop token: 7 tokens of 0.25 and 6 of 1.
    assert (document.supervised, document.weighted) == (13, 7.75)
    batch = collate([Example((document,), None, 0)], layout="rows", pad_id=0)
    assert batch.target_weights is not None
    assert batch.target_weights.tolist() == [0.25] * 7 + [1.0] * 6
    assert batch.extras == {}


def test_a_template_with_eos_and_a_bos_per_turn(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(LLAMA2)
    example = encode_row(chat("Hi", "Hello", "Bye", "Ciao"), tokenizer, options("chat"), 0)
    assert learnt(example, tokenizer) == [" Hello </s>", " Ciao </s>"]


def test_a_template_that_rewrites_earlier_turns(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(THINKING)
    row = chat("Q1", "A1", "Q2", "<think>hm</think>A2")
    example = encode_row(row, tokenizer, options("chat"), 0)
    assert learnt(example, tokenizer) == ["A1<|im_end|>", "<think>hm</think>A2<|im_end|>"]


def test_a_reply_that_the_template_rewrote_is_refused_and_not_quoted(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(THINKING)
    row = chat("Q1", "<think>secret</think>A1", "Q2", "A2")
    with pytest.raises(InvalidData) as caught:
        encode_row(row, tokenizer, options("chat"), 7)
    assert caught.value.code == "tokenizer_error"
    assert "row 7" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_refusing_template_is_not_quoted(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(PICKY)
    row = {"messages": [{"role": "system", "content": "secret"}, *chat("a", "b")["messages"]]}
    with pytest.raises(InvalidData) as caught:
        encode_row(row, tokenizer, options("chat"), 3)
    assert "secret" not in str(caught.value)
    assert "row 3" in str(caught.value)


def test_training_on_all_tokens_leaves_out_the_bos(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML)
    example = encode_row(chat("Hi", "Yo"), tokenizer, options("chat", train_on="all"), 0)
    labels = example.documents[0].labels
    assert labels[0] == IGNORE
    assert (labels[1:] != IGNORE).all()


def test_a_doubled_bos_becomes_one(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML)
    example = encode_row(chat("Hi", "Yo"), tokenizer, options("chat"), 0)
    assert example.documents[0].input_ids[:2].tolist() == [0, 2]
    assert learnt(example, tokenizer) == ["Yo<|im_end|>"]


def test_content_in_parts_is_joined(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    row = chat("Hi", "x")
    row["messages"][1]["content"] = [
        {"type": "text", "text": "one "},
        {"type": "text", "text": "two"},
    ]
    assert learnt(encode_row(row, tokenizer, options("chat"), 0), tokenizer) == [
        "one two<|im_end|>"
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_a_completion_is_learnt_with_its_stop_token(bos: bool, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None, bos=bos)
    row = {"prompt": "2+2=", "completion": "4"}
    example = encode_row(row, tokenizer, options("prompt_completion"), 0)
    assert learnt(example, tokenizer) == ["4</s>"]
    assert whole(example, tokenizer) == ("<s>" if bos else "") + "2+2=4</s>"


def test_a_completion_that_brings_its_stop_token_gets_no_second(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None, bos=True)
    row = {"prompt": "<s>a", "completion": "b</s>"}
    example = encode_row(row, tokenizer, options("prompt_completion"), 0)
    assert whole(example, tokenizer) == "<s>ab</s>"
    assert learnt(example, tokenizer) == ["b</s>"]


def test_text_is_learnt_but_for_the_bos(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None, bos=True)
    example = encode_row({"text": "abc"}, tokenizer, options("text"), 0)
    assert learnt(example, tokenizer) == ["abc</s>"]
    assert example.documents[0].supervised == 4


def test_a_preference_row_is_two_documents_that_learn_their_outputs_only(
    make_tokenizer: Any,
) -> None:
    tokenizer = make_tokenizer(CHATML)
    row = {
        "input": chat("Q0", "A0", "Q1"),
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad"}],
    }
    example = encode_row(row, tokenizer, options("preference"), 0)
    assert [learnt(example, tokenizer, d) for d in (0, 1)] == [
        ["good<|im_end|>"],
        ["bad<|im_end|>"],
    ]
    assert "A0" in whole(example, tokenizer, 1)


def test_conversational_prompts_and_completions(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    row = {
        "prompt": chat("Q0", "A0", "Q1")["messages"],
        "completion": [chat("", "A1")["messages"][1]],
    }
    example = encode_row(row, tokenizer, options("prompt_completion"), 0)
    assert learnt(example, tokenizer) == ["A1<|im_end|>"]


def test_what_is_over_the_length_is_cut_off(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    example = encode_row(chat("Hi", "a" * 50), tokenizer, options("chat", max_length=30), 0)
    assert len(example.documents[0].input_ids) == 30
    assert learnt(example, tokenizer)[0].strip("a") == ""


def test_without_a_template_the_row_is_refused_with_the_way_out(make_tokenizer: Any) -> None:
    with pytest.raises(InvalidData, match="chat_template transform"):
        encode_row(chat("a", "b"), make_tokenizer(None), options("chat"), 0)


def test_variables_of_the_row_reach_the_template(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ mood }}|" + CHATML)
    row = chat("Hi", "Yo", chat_template_kwargs={"mood": "calm"})
    example = encode_row(row, tokenizer, options("chat"), 0)
    assert whole(example, tokenizer).startswith("calm|")
    assert learnt(example, tokenizer) == ["Yo<|im_end|>"]
