"""A small Llama with random weights and a tokenizer of its own: a base model without a download."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.models import ModelStore
from tunery.models.importing import import_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tunery.models import ModelInfo

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
_SUBJECTS = ["invoice", "parcel", "password", "refund", "account", "order", "coupon", "address"]
_STATES = ["is missing", "is wrong", "arrived late", "was charged twice", "cannot be changed"]


def chats(count: int, *, seed: int = 7, turns: int = 1) -> Iterator[dict[str, object]]:
    """Rows of a toy task: complaints answered by a JSON object."""
    chance = random.Random(seed)
    for _ in range(count):
        messages = []
        for _ in range(turns):
            subject, state = chance.choice(_SUBJECTS), chance.choice(_STATES)
            number = chance.randrange(10_000)
            answer = json.dumps({"topic": subject, "problem": state, "ticket": number})
            messages += [
                {"role": "user", "content": f"Hello, my {subject} {number} {state}, please help."},
                {"role": "assistant", "content": answer},
            ]
        yield {"messages": messages}


def jsonl(rows: Iterator[dict[str, object]]) -> bytes:
    """Rows as a data file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def add_tiny_model(
    models_dir: Path,
    name: str = "tiny",
    *,
    hidden_size: int = 64,
    layers: int = 2,
    seed: int = 0,
) -> ModelInfo:
    """Build the model and import it into a store; one that is there already is kept."""
    store = ModelStore(models_dir)
    if (found := store.get(name)) is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="tunery-tiny-") as folder:
        build(Path(folder), hidden_size=hidden_size, layers=layers, seed=seed)
        return import_model(store, Path(folder), name)


def build(folder: Path, *, hidden_size: int, layers: int, seed: int) -> None:
    """Write config, weights, tokenizer and chat template, as `save_pretrained` does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_train_tokenizer([row_text(row) for row in chats(300)]),
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    heads = max(2, hidden_size // 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def row_text(row: dict[str, object]) -> str:
    """What the tokenizer is trained on."""
    messages = row["messages"]
    assert isinstance(messages, list)
    return "\n".join(message["content"] for message in messages)


def _train_tokenizer(texts: Sequence[str]) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
