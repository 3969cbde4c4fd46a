"""A small laboratory: tiny random models, made-up examples, loops that remember what they said."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunery.methods.supervised import Supervised, SupervisedConfig
from tunery.spec import BaseModelRef, Data, DataFile, TrainingSpec, Use
from tunery.tasks.text_generation import Runtime
from tunery.training.control import StopFlag
from tunery.training.engines import engine_for
from tunery.training.loop import Loop, LoopSettings
from tunery.training.losses import HeadPolicy, TokenLossComputer
from tunery.training.optimizer import OptimizerSettings
from tunery.training.protocol import RunOrder
from tunery.training.store import build
from tunery.training.types import IGNORE, Document, Example, MethodRun

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tunery.training.loop import LoopState
    from tunery.training.store import TokenStore

VOCABULARY = 97
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]


def _make_tokenizer(template: str | None, *, bos: bool = False) -> Any:
    """Bytes as tokens, with special ones: what is learnt can be read off."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*SPECIALS, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclass
class Record:
    """Reporter and saver that keep what they are told."""

    points: list[dict[str, float]] = field(default_factory=list)
    warnings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    saves: list[tuple[int, bool]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def metrics(self, step: int, epoch: float, values: Any, tokens: int, left: Any) -> None:
        self.points.append(
            {"step": step, "epoch": epoch, "trained_tokens": tokens, "left": left, **values}
        )

    def warning(self, code: str, message: str, **data: Any) -> None:
        self.warnings.append((code, data))

    def save(self, state: LoopState, *, final: bool) -> None:
        self.saves.append((state.step, final))

    def series(self, name: str) -> list[float]:
        return [point[name] for point in self.points if name in point]


class Lab:
    """Everything deterministic by seed; float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def llama(self, **overrides: Any) -> LlamaForCausalLM:
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            **overrides,
        }
        torch.manual_seed(0)
        # Wide enough that losses differ between documents: a leak would show.
        return LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2)).eval()

    def lora(self, model: Any = None, *, dropout: float = 0.0, random_b: bool = False) -> Any:
        torch.manual_seed(1)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        tuned = get_peft_model(self.llama() if model is None else model, config)
        if random_b:
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        return tuned

    def examples(
        self,
        count: int,
        *,
        seed: int = 0,
        shortest: int = 4,
        longest: int = 24,
        supervised: float = 0.5,
        weight: float = 1.0,
        documents: int = 1,
    ) -> list[Example]:
        draw = np.random.default_rng(seed)
        return [
            Example(
                documents=tuple(
                    _document(draw, shortest, longest, supervised, weight) for _ in range(documents)
                ),
                target=None,
                index=index,
            )
            for index in range(count)
        ]

    def store(self, examples: Sequence[Example]) -> TokenStore:
        self._count += 1
        return build(examples, Runtime().units, self._folder / f"store-{self._count}")

    def objective(self, model: Any, policy: HeadPolicy | None = None) -> Any:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        run = MethodRun(
            task=Runtime(), token_losses=TokenLossComputer(base, policy), reference=None, seed=0
        )
        return Supervised().objective(SupervisedConfig(), run)

    def optimizer(self, steps: int, **overrides: Any) -> OptimizerSettings:
        values: dict[str, Any] = {
            "learning_rate": 1e-2,
            "schedule": "linear",
            "warmup_steps": 1,
            "total_steps": steps,
            **overrides,
        }
        return OptimizerSettings(**values)

    def loop(
        self,
        model: Any,
        examples: Sequence[Example],
        *,
        steps: int = 6,
        valid: Sequence[Example] | None = None,
        objective: Any = None,
        policy: HeadPolicy | None = None,
        optimizer: dict[str, Any] | None = None,
        strategy: str = "single",
        stop: StopFlag | None = None,
        saver: Any = None,
        state: LoopState | None = None,
        **settings: Any,
    ) -> tuple[Loop, Record]:
        record = Record()
        engine = engine_for(strategy)
        engine.start(torch.device("cpu"))
        engine.prepare(model, self.optimizer(steps, **(optimizer or {})))
        values: dict[str, Any] = {
            "total_steps": steps,
            "batch_size": 4,
            "seed": 3,
            "micro_batch_tokens": 1 << 16,
            **settings,
        }
        loop = Loop(
            engine=engine,
            objective=objective or self.objective(model, policy),
            task=Runtime(),
            train=self.store(examples),
            valid=self.store(valid) if valid else None,
            settings=LoopSettings(**values),
            device=torch.device("cpu"),
            reporter=record,
            saver=saver or record,
            stop=stop or StopFlag(),
            state=state,
        )
        return loop, record


def _document(
    draw: np.random.Generator, shortest: int, longest: int, supervised: float, weight: float
) -> Document:
    length = int(draw.integers(shortest, longest + 1))
    ids = draw.integers(0, VOCABULARY, length).astype(np.int32)
    learnt = np.arange(length) >= length - max(1, math.floor(supervised * length))
    return Document(ids, np.where(learnt, ids, np.int32(IGNORE)), weight)


@pytest.fixture
def make_tokenizer() -> Any:
    """`make_tokenizer(template, bos=False)`."""
    return _make_tokenizer


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Lab(tmp_path)
    torch.set_num_threads(before)


@pytest.fixture
def base_model(lab: Lab, tmp_path: Path) -> Path:
    return write_base_model(lab, tmp_path / "base")


def write_base_model(lab: Lab, folder: Path) -> Path:
    """A folder with a tiny random Llama, a byte tokenizer and a ChatML template."""
    lab.llama(vocab_size=261, max_position_embeddings=256).save_pretrained(folder)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    _make_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture
def make_order(base_model: Path, tmp_path: Path) -> Any:
    """`make_order(rows, config=..., adapter=..., **spec)`: writes the files, gives a RunOrder."""

    def write(rows: Sequence[dict[str, Any]], name: str, format: str) -> tuple[DataFile, str]:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = path.read_bytes()
        file = DataFile(
            file_id=f"file-{name}",
            sha256=hashlib.sha256(data).hexdigest(),
            format=format,
            rows=len(rows),
            size_bytes=len(data),
        )
        return file, str(path)

    def make(
        rows: Sequence[dict[str, Any]],
        valid: Sequence[dict[str, Any]] = (),
        *,
        format: str = "chat",
        config: dict[str, Any] | None = None,
        adapter: Use | None = None,
        base: Path = base_model,
        order: dict[str, Any] | None = None,
        **spec: Any,
    ) -> RunOrder:
        training, training_path = write(rows, "train.jsonl", format)
        validation, validation_path = write(valid, "valid.jsonl", format) if valid else (None, None)
        settings = {"batch_size": 4, "learning_rate": 1e-2, "max_length": 64, **(config or {})}
        return RunOrder(
            run="ftjob-test",
            spec=TrainingSpec(
                model=BaseModelRef(name="tiny"),
                task=Use(type="text-generation"),
                method=Use(type="supervised", config=settings),
                adapter=adapter or Use(type="lora", config={"r": 4, "lora_alpha": 8}),
                data=Data(training=training, validation=validation),
                seed=5,
                **spec,
            ),
            base_model_path=str(base),
            training_path=training_path,
            validation_path=validation_path,
            **(order or {}),
        )

    return make


@pytest.fixture
def chats() -> Any:
    """`chats(n, seed=0)`: short conversations of unlike lengths."""

    def make(count: int, seed: int = 0) -> list[dict[str, Any]]:
        draw = np.random.default_rng(seed)
        words = ["yes", "no", "perhaps", "of course", "let me see"]
        return [
            {
                "messages": [
                    {"role": "user", "content": " ".join(draw.choice(words, draw.integers(1, 4)))},
                    {"role": "assistant", "content": str(draw.choice(words))},
                ]
            }
            for _ in range(count)
        ]

    return make
