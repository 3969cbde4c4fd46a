"""The look before the first step: what it counts, warns of and refuses."""

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunery.errors import InvalidData
from tunery.training.preflight import inspect
from tunery.training.types import IGNORE, Document, EncodeOptions, Example

PAD, EOS, BOS, END, UNK, A, B = range(7)


def tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    words = {
        "<unk>": UNK,
        "alpha": A,
        "beta": B,
        "<pad>": PAD,
        "<eos>": EOS,
        "<s>": BOS,
        "<end>": END,
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if settings.pop("adds_bos", False):
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    specials = [AddedToken(name, special=True) for name in ("<pad>", "<eos>", "<s>", "<end>")]
    backend.add_special_tokens(specials)
    given = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<s>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def document(ids: list[int], trained: int) -> Document:
    """The last `trained` tokens are learnt."""
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    if trained:
        labels[-trained:] = ids[-trained:]
    return Document(np.array(ids, dtype=np.int32), labels)


def chat(*documents: Document) -> list[Example]:
    return [Example((one,), None, i) for i, one in enumerate(documents)]


def look(
    examples: Any, format: Any = "chat", max_length: int = 64, labels: Any = None, **rest: Any
):
    options = EncodeOptions(format=format, max_length=max_length, labels=labels)
    return inspect(examples, tokenizer(**rest), options)


GOOD = document([A, B, A, B, EOS], 2)


def codes(result: Any) -> list[str]:
    return [finding.code for finding in result.findings]


def test_a_good_file_is_counted_and_passes() -> None:
    result = look(chat(GOOD, document([A] * 15 + [B, EOS], 2)))
    result.check()
    assert codes(result) == []
    assert (result.rows, result.tokens, result.trained_tokens) == (2, 22, 4)
    assert result.trained_share is not None
    assert result.trained_share.max == 2 / 4
    assert result.trained_share.min == 2 / 16
    assert result.stop_tokens == {"<eos>": 2}
    assert result.longest == 17
    assert [(b.up_to, b.rows) for b in result.histogram] == [(16, 1), (32, 1)]
    assert type(result).model_validate_json(result.model_dump_json()) == result


def test_a_file_without_trained_tokens_is_refused() -> None:
    result = look(chat(document([A, B, EOS], 0), document([A, EOS], 0)))
    with pytest.raises(InvalidData, match="none of the 5 tokens in 2 rows") as caught:
        result.check()
    assert caught.value.code == "no_trainable_tokens"
    assert caught.value.param == "training_file"


def test_only_the_first_token_marked_is_nothing_to_learn() -> None:
    only_first = Document(np.array([A, B]), np.array([A, IGNORE]))
    assert look(chat(only_first)).refusal is not None


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(InvalidData, match="no rows"):
        look([]).check()


def test_rows_without_trained_tokens_are_named() -> None:
    result = look(chat(GOOD, document([A, B], 0), GOOD, document([B], 0)))
    result.check()
    assert codes(result) == ["rows_without_trained_tokens"]
    assert result.findings[0].rows == 2
    assert result.findings[0].first_rows == (1, 3)


def test_prompts_that_are_trained_are_warned_of() -> None:
    every = document([A, B, EOS], 3)
    assert codes(look(chat(every, every))) == ["prompts_are_trained"]
    assert codes(look(chat(every, GOOD))) == []
    assert codes(look(chat(every), format="text")) == []


def test_a_stop_token_left_out_is_warned_of() -> None:
    result = look(chat(GOOD, document([A, B, A], 1)))
    assert codes(result) == ["stop_token_not_trained"]
    assert result.findings[0].first_rows == (1,)


def test_another_stop_token_than_the_tokenizers_is_warned_of() -> None:
    result = look(chat(document([A, B, B, END], 2)))
    assert codes(result) == ["stop_token_is_not_eos"]
    assert "<end>" in result.findings[0].message
    assert "<eos>" in result.findings[0].message
    assert codes(look(chat(document([A, B, B, END], 2)), eos_token="<end>")) == []


def test_cut_rows_are_counted_and_not_blamed_for_their_missing_stop_token() -> None:
    cut = document([A, B, A, B, A], 2)
    result = look(chat(cut, GOOD), max_length=5)
    assert result.truncated_rows == 1
    assert codes(result) == ["rows_truncated"]
    assert codes(look(chat(cut, *[GOOD] * 19), max_length=5)) == []


def test_bos_has_to_be_there_once() -> None:
    once = document([BOS, A, B, EOS], 2)
    twice = document([BOS, BOS, A, B, EOS], 2)
    assert codes(look(chat(once), adds_bos=True)) == []
    assert codes(look(chat(once, twice), adds_bos=True)) == ["bos_twice"]
    assert codes(look(chat(once, GOOD), adds_bos=True)) == ["bos_missing"]
    # A template's turns may begin with the token that is also BOS.
    turns = document([BOS, A, EOS, BOS, B, EOS], 2)
    assert codes(look(chat(turns), adds_bos=True)) == []


def test_pad_equal_to_eos_is_recorded_and_a_pad_in_the_text_warned_of() -> None:
    shared = look(chat(GOOD), pad_token="<eos>")
    assert shared.pad_is_eos
    assert codes(shared) == []
    assert shared.stop_tokens == {"<eos>": 1}
    inside = look(chat(document([A, PAD, B, EOS], 2)))
    assert not inside.pad_is_eos
    assert codes(inside) == ["pad_token_in_text"]


def pair(left: Document, right: Document, index: int = 0) -> Example:
    return Example((left, right), None, index)


def test_equal_replies_teach_nothing() -> None:
    other = document([A, B, B, EOS], 2)
    mixed = look([pair(GOOD, other), pair(GOOD, GOOD, 1)], format="preference")
    mixed.check()
    assert codes(mixed) == ["equal_replies"]
    with pytest.raises(InvalidData, match="both replies are the same"):
        look([pair(GOOD, GOOD)], format="preference").check()


def test_pairs_of_which_a_reply_is_cut_off_are_told_of() -> None:
    cut = document([A, B, B, A], 0)
    result = look(
        [pair(GOOD, document([A, B, B, EOS], 2)), pair(GOOD, cut, 1)], format="preference"
    )
    result.check()
    assert codes(result) == ["pairs_without_a_reply"]
    assert result.findings[0].first_rows == (1,)


def classified(*targets: int) -> list[Example]:
    return [Example((document([A, B], 0),), target, i) for i, target in enumerate(targets)]


def test_classes_are_counted_by_name() -> None:
    result = look(classified(0, 1, 1), format="classification", labels=("ham", "spam", "other"))
    result.check()
    assert result.labels == {"ham": 1, "spam": 2, "other": 0}
    assert result.trained_share is None
    assert codes(result) == ["labels_without_rows"]


def test_a_single_class_is_refused() -> None:
    result = look(classified(1, 1), format="classification", labels=("ham", "spam"))
    with pytest.raises(InvalidData, match="all 2 rows have the same label"):
        result.check()


def test_no_finding_quotes_the_text() -> None:
    result = look(chat(document([A, PAD, A], 0), document([A, B, A], 1)), max_length=3)
    assert result.findings
    shown = " ".join(f"{finding.message} {finding.hint}" for finding in result.findings)
    assert "alpha" not in shown
    assert "beta" not in shown
