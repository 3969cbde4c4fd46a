"""Rows token by token: texts add up, trained ones are marked, problems are collected."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunery import catalogue
from tunery.errors import InvalidData
from tunery.spec import Use
from tunery.training.preview import preview, rendered
from tunery.training.types import EncodeOptions

SPECIALS = ["<pad>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )


def turns(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = [turns("Où?", "Là — 漢字 🎉\nok"), turns("Hi", "Ho")]
CHATML = (Use(type="chat_template", config={"name": "chatml"}),)
CHAT = EncodeOptions(format="chat", max_length=200)


def look(tokenizer: Any, rows: Any = ROWS, **settings: Any) -> Any:
    given = {"transforms": CHATML, "show": 2, **settings}
    options = given.pop("options", CHAT)
    task = catalogue.find("tasks", given.pop("task", "text-generation")).runtime(None)
    return preview(rows, tokenizer, task, options, **given)


def test_the_tokens_spell_the_row_and_the_reply_is_marked(tokenizer: Any) -> None:
    first = look(tokenizer).rows[0].documents[0]
    assert "".join(token.text for token in first.tokens) == (
        "<|im_start|>user\nOù?<|im_end|>\n<|im_start|>assistant\nLà — 漢字 🎉\nok<|im_end|>\n"
    )
    assert [text for text, trained in first.segments() if trained] == ["Là — 漢字 🎉\nok<|im_end|>"]
    assert first.trained_tokens == sum(token.trained for token in first.tokens)
    assert {token.text for token in first.tokens if token.special} == set(SPECIALS[1:])


def test_it_is_plain_json(tokenizer: Any) -> None:
    result = look(tokenizer)
    assert type(result).model_validate_json(result.model_dump_json()) == result


def test_only_so_many_rows_are_shown_and_all_are_counted(tokenizer: Any) -> None:
    result = look(tokenizer, ROWS * 5, show=1)
    assert len(result.rows) == 1
    assert result.preflight.rows == 10
    assert result.preflight.template_sha256 is not None


def test_rows_that_cannot_be_encoded_are_collected(tokenizer: Any) -> None:
    labels = ("a", "b")
    options = EncodeOptions(format="classification", max_length=20, labels=labels)
    rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}, {"text": "z", "label": "b"}]
    result = look(tokenizer, rows, options=options, task="text-classification", transforms=())
    assert [problem.row for problem in result.problems] == [1]
    assert [row.label for row in result.rows] == ["a", "b"]
    with pytest.raises(InvalidData) as caught:
        result.check()
    assert caught.value.code == "unknown_label"
    assert caught.value.problems[0]["row"] == 1


def test_data_without_a_reply_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidData) as caught:
        look(tokenizer, [{"messages": [{"role": "user", "content": "Hi"}]}]).check()
    assert caught.value.code == "no_trainable_tokens"


def test_a_terminal_sees_colours_and_line_breaks(tokenizer: Any) -> None:
    text = rendered(look(tokenizer).rows[1].documents[0])
    assert text.plain == "<|im_start|>user↵\nHi<|im_end|>↵\n<|im_start|>assistant↵\nHo<|im_end|>↵\n"
    green = "".join(text.plain[s.start : s.end] for s in text.spans if s.style == "black on green")
    assert green == "Ho<|im_end|>"
