"""What the methods are tried on: a byte tokenizer, a tiny policy, runs of the trainer's program."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunery import catalogue
from tunery.data import formats
from tunery.spec import (
    BaseModelRef,
    Checkpoints,
    Compute,
    Data,
    DataFile,
    Evaluation,
    TrainingSpec,
    Use,
)
from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_DONE, RunOrder
from tunery.training.types import AdapterRun

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a template without generation marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def make_base(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """`make_base(seed=3, **config)`: wide enough that documents' losses differ."""

    def make(seed: int = 3, **config: Any) -> LlamaForCausalLM:
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                **{**sizes, **config},
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )

    return make


@pytest.fixture(scope="session")
def make_policy(make_base: Any, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """`make_policy(adapter="lora", **config)`: a base with the adapter on it."""

    def make(adapter: str = "lora", **config: Any) -> Any:
        entry = catalogue.find("adapters", adapter)
        run = AdapterRun(make_base(), "CAUSAL_LM", tokenizer, 0, "example/base")
        return entry.apply(entry.Config(**config), run)

    return make


@pytest.fixture(scope="session")
def base_folder(
    make_base: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A base model as an import leaves it."""
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_order(base_folder: Path, tmp_path: Path) -> Callable[..., RunOrder]:
    """`make_order(method, rows, config={}, ...)`: a run over these rows, which it writes."""

    def write(rows: Sequence[Any], name: str) -> tuple[DataFile, str]:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        form = formats.detect(rows[0])
        assert isinstance(form, formats.Format), form
        data = path.read_bytes()
        file = DataFile(
            file_id=f"file-{name}",
            sha256=hashlib.sha256(data).hexdigest(),
            format=form.name,
            rows=len(rows),
            size_bytes=len(data),
        )
        return file, str(path)

    def make(
        method: str,
        rows: Sequence[Any],
        config: dict[str, Any] | None = None,
        *,
        valid: Sequence[Any] = (),
        task: str = "text-generation",
        adapter: Use | None = None,
        compute: dict[str, Any] | None = None,
        every: int | None = None,
        **order: Any,
    ) -> RunOrder:
        entry = catalogue.find("methods", method)
        settings = {"batch_size": 4, "learning_rate": 5e-3, "max_length": 128, **(config or {})}
        training, training_path = write(rows, "train.jsonl")
        validation, validation_path = write(valid, "valid.jsonl") if valid else (None, None)
        spec = TrainingSpec(
            model=BaseModelRef(name="example/base"),
            task=Use(type=task),
            method=Use(type=method, config=entry.Config(**settings).model_dump(mode="json")),
            adapter=adapter or Use(type="lora", config={"r": 4}),
            data=Data(training=training, validation=validation),
            seed=5,
            compute=Compute(device="cpu", **(compute or {})),
            checkpoints=Checkpoints(every_steps=every),
            evaluation=Evaluation(metrics=("loss",)),
        )
        return RunOrder(
            run="run-1",
            spec=spec,
            base_model_path=str(base_folder),
            training_path=training_path,
            validation_path=validation_path,
            **order,
        )

    return make


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[Any]]:
    """`train(order, name="run")`: the events of a run that came to its end."""

    def run(order: RunOrder, name: str = "run") -> list[Any]:
        workdir = tmp_path / name
        workdir.mkdir()
        events: list[Any] = []
        code = program.run(order, workdir, events.append, StopFlag())
        assert code == EXIT_DONE, [event for event in events if event.kind == "failure"]
        return events

    return run


@pytest.fixture
def series() -> Callable[..., list[float]]:
    """`series(events, "train_loss")`: a metric's values in the order of steps."""

    def read(events: Sequence[Any], name: str) -> list[float]:
        points = [event for event in events if event.kind == "metrics"]
        return [point.values[name] for point in points if name in point.values]

    return read
