"""The chat template transform: rows, tokenizer, refusals, and our own templates' marks."""

import pytest
from pydantic import ValidationError

from tunery.transforms.chat_template import TEMPLATES, ChatTemplate, ChatTemplateConfig

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello you"}


class BareTokenizer:
    chat_template = "the tokenizer's own"


def run(rows, tokenizer=None, **config):
    return ChatTemplate().apply(ChatTemplateConfig(**config), rows, tokenizer or BareTokenizer())


def test_without_settings_rows_and_template_stay() -> None:
    tokenizer = BareTokenizer()
    rows = [{"messages": [USER, ASSISTANT]}]
    assert run(rows, tokenizer) == rows
    assert tokenizer.chat_template == "the tokenizer's own"


def test_a_system_message_is_added_only_where_there_is_none() -> None:
    own = {"role": "system", "content": "own"}
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [own, USER]}]
    first, second = run(rows, system="ours")
    assert first["messages"][0] == {"role": "system", "content": "ours"}
    assert first["messages"][1:] == [USER, ASSISTANT]
    assert second["messages"] == [own, USER]
    assert rows[0]["messages"] == [USER, ASSISTANT]


def test_preference_rows_get_it_in_their_input() -> None:
    row = {
        "input": {"messages": [USER]},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [ASSISTANT],
    }
    (out,) = run([row], system="ours")
    assert [m["role"] for m in out["input"]["messages"]] == ["system", "user"]
    assert out["preferred_output"] == [ASSISTANT]


def test_template_variables_go_with_the_row_and_the_rows_own_win() -> None:
    rows = [{"messages": [USER]}, {"messages": [USER], "chat_template_kwargs": {"a": 2}}]
    first, second = run(rows, template_kwargs={"a": 1, "b": 3})
    assert first["chat_template_kwargs"] == {"a": 1, "b": 3}
    assert second["chat_template_kwargs"] == {"a": 2, "b": 3}


def test_another_template_becomes_the_tokenizers_own() -> None:
    tokenizer = BareTokenizer()
    run([], tokenizer, template="{{ messages }}")
    assert tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"template": "{% for %}"}, "line 1 of the template"),
        ({"template": "{% include 'x' %}"}, "other templates cannot be loaded"),
        ({"name": "plain", "template": "{{ messages }}"}, "not both"),
        ({"name": "plian"}, "'chatml' or 'plain'"),
        ({"template_kwargs": {"messages": "x"}}, "set by the trainer itself"),
    ],
)
def test_bad_settings_are_refused(config, message) -> None:
    with pytest.raises(ValidationError, match=message):
        ChatTemplateConfig(**config)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<|im_start|>", "<|im_end|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


RENDERED = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello you<|im_end|>\n",
    "plain": "<|im_start|>User: Hi\nAssistant: Hello you<|im_end|>\n",
}
TRAINED = {"chatml": "Hello you<|im_end|>", "plain": " Hello you<|im_end|>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_templates_render_and_mark_what_the_assistant_says(tokenizer, name) -> None:
    run([], tokenizer, name=name)
    chat = [USER, ASSISTANT]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == RENDERED[name]
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert RENDERED[name].startswith(prompt)
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    trained = [token for token, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(trained) == TRAINED[name]
