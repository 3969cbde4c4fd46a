"""The training loop against `transformers.Trainer` + PEFT, TRL's SFTTrainer and a bare torch loop.

    python -m bench.training [rounds [body head control loop]]

Data, made up, of random tokens:

- D1, the control: 256 tokens each, all supervised. Nothing to gain but the loop itself.
- D2, like chats: log-normal lengths (median 32, at most 256), the second half supervised.

Models, random, LoRA r 8 on all linear layers: body-heavy has 6 layers of width 512 and 4,096 words,
head-heavy 4 layers of width 256 and 32,000 words. Batches of 8, float32, one thread, no
recomputation, the same examples in the same order: a side whose losses differ by more than 1e-4
stops the benchmark. Counted are real tokens per CPU second, without the first step.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import harness
from bench.figures import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

STEPS, BATCH, LONGEST = 5, 8, 256
_COMMAND = "python -m bench.training"


def _figure(key: str, what: str, baseline: str, at_least: float) -> Figure:
    return Figure(
        key=key,
        what=what,
        subject="ours",
        baseline=baseline,
        unit="tokens per CPU second",
        command=_COMMAND,
        at_least=at_least,
    )


FIGURES = [
    _figure("train-trainer-body", "D2, body-heavy, against Trainer + PEFT", "trainer", 1.5),
    _figure("train-trainer-head", "D2, head-heavy, against Trainer + PEFT", "trainer", 2.5),
    _figure("train-trl-body", "D2, body-heavy, against TRL's SFTTrainer", "trl", 1.8),
    _figure("train-trl-head", "D2, head-heavy, against TRL's SFTTrainer", "trl", 5),
    _figure("train-control", "D1, body-heavy, against Trainer + PEFT", "trainer", 1.0),
    Figure(
        key="train-loop",
        what="CPU seconds of the loop over those of a bare torch loop on the same tensors, D2",
        subject="ours",
        baseline="bare",
        unit="CPU seconds per step",
        command=_COMMAND,
        at_most=1.05,
    ),
]

BODY = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "vocab_size": 4096}
HEAD = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 32000}


@dataclass
class Timeline:
    """CPU seconds and losses at the end of each step."""

    at: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def mark(self, loss: float) -> None:
        self.at.append(time.process_time())
        self.losses.append(loss)

    @property
    def seconds(self) -> float:
        """From the end of the first step to the end of the last."""
        return self.at[-1] - self.at[0]


@dataclass
class Setup:
    """A model's shape and its examples, in the order of the steps."""

    shape: dict[str, int]
    examples: list[Any]
    folder: Path
    losses: list[float] | None = None

    @property
    def order(self) -> list[int]:
        """Example numbers, step by step."""
        from tunery.training.batching import global_batch

        count = len(self.examples)
        return [int(i) for step in range(STEPS) for i in global_batch(count, BATCH, 3, step)]

    @property
    def tokens(self) -> int:
        """Real tokens after the first step."""
        return sum(self.examples[i].tokens for i in self.order[BATCH:])

    def model(self) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                **self.shape,
                num_attention_heads=8,
                num_key_value_heads=8,
                max_position_embeddings=LONGEST,
            )
        )
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, config)

    def check(self, timeline: Timeline) -> None:
        """Every side has to have trained the same.

        Raises:
            RuntimeError: another loss curve, which would make the times meaningless.
        """
        self.losses = self.losses or timeline.losses
        pairs = zip(self.losses, timeline.losses, strict=True)
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
            raise RuntimeError(f"the losses differ: {self.losses} and {timeline.losses}")

    def rate(self, timeline: Timeline) -> float:
        """Real tokens per CPU second."""
        self.check(timeline)
        return self.tokens / timeline.seconds


def examples(vocabulary: int, *, chat: bool) -> list[Any]:
    """One epoch of them, as many as all steps take."""
    import numpy as np

    from tunery.training.types import IGNORE, Document, Example

    draw = np.random.default_rng(0)
    made = []
    for index in range(STEPS * BATCH):
        length = LONGEST
        if chat:
            length = int(np.clip(draw.lognormal(math.log(LONGEST / 8), 1.0), 8, LONGEST))
        ids = draw.integers(0, vocabulary, length).astype(np.int32)
        learnt = np.arange(length) >= (length // 2 if chat else 0)
        labels = np.where(learnt, ids, np.int32(IGNORE))
        made.append(Example(documents=(Document(ids, labels),), target=None, index=index))
    return made


# Sides


def ours(setup: Setup) -> Timeline:
    """Our loop, as a run on a CPU has it."""
    import torch

    from tunery.methods.supervised import Supervised, SupervisedConfig
    from tunery.tasks.text_generation import Runtime
    from tunery.training.control import StopFlag
    from tunery.training.engines import engine_for
    from tunery.training.loop import Loop, LoopSettings
    from tunery.training.losses import TokenLossComputer
    from tunery.training.store import build
    from tunery.training.types import MethodRun

    model, timeline = setup.model(), Timeline()
    engine = engine_for("single")
    engine.prepare(model, _optimizer())
    losses = TokenLossComputer(model.get_base_model())
    run = MethodRun(task=Runtime(), token_losses=losses, reference=None, seed=0)
    Loop(
        engine=engine,
        objective=Supervised().objective(SupervisedConfig(), run),
        task=Runtime(),
        train=build(setup.examples, Runtime().units, setup.folder / "store"),
        valid=None,
        settings=LoopSettings(
            total_steps=STEPS, batch_size=BATCH, seed=3, micro_batch_tokens=BATCH * LONGEST // 4
        ),
        device=torch.device("cpu"),
        reporter=_Ears(timeline),
        saver=_NoSaver(),
        stop=StopFlag(),
    ).run()
    return timeline


def _optimizer() -> Any:
    from tunery.training.optimizer import OptimizerSettings

    return OptimizerSettings(
        learning_rate=1e-3, schedule="constant", warmup_steps=0, total_steps=STEPS
    )


class _Ears:
    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def phase(self, name: str) -> None:
        """Not timed."""

    def metrics(self, step: int, epoch: float, values: Any, tokens: int, left: Any) -> None:
        self._timeline.mark(values["train_loss"])

    def warning(self, code: str, message: str, **data: Any) -> None:
        raise RuntimeError(message)


class _NoSaver:
    def save(self, state: Any, *, final: bool) -> None:
        """The other sides save nothing either."""


def bare(setup: Setup) -> Timeline:
    """Plain torch over the micro-batches that our loop makes, collated beforehand."""
    import torch

    from tunery.training.batching import plan
    from tunery.training.collate import collate
    from tunery.training.losses import TokenLossComputer

    model, timeline = setup.model(), Timeline()
    model.train()
    losses = TokenLossComputer(model.get_base_model())
    steps = [list(_batches(setup, number, plan, collate)) for number in range(STEPS)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    for batches in steps:
        units = sum(batch.supervised for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            loss = losses(model, batch).nll.sum() / units
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
        timeline.mark(total.item())
    return timeline


def _batches(setup: Setup, step: int, plan: Any, collate: Any) -> Iterator[Any]:
    import numpy as np

    lengths = np.array([example.longest for example in setup.examples])
    chosen = np.array(setup.order[step * BATCH : (step + 1) * BATCH])
    shape = (lengths, lengths, np.ones_like(lengths))
    for micro in plan(chosen, *shape, budget=BATCH * LONGEST // 4, layout="rows"):
        members = [setup.examples[number] for number in micro.examples]
        yield collate(members, layout="rows", pad_id=0)


def trainer(setup: Setup) -> Timeline:
    """transformers.Trainer with PEFT's model, padding to the batch's longest."""
    from transformers import Trainer, TrainingArguments

    given = {"train_dataset": _rows(setup), "data_collator": _padded}
    return _theirs(Trainer, TrainingArguments, setup, given, {})


def trl(setup: Setup) -> Timeline:
    """TRL's SFTTrainer in float32, without recomputation."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    given = {
        "train_dataset": datasets.Dataset.from_list(_rows(setup)),
        "processing_class": _tokenizer(),
    }
    arguments = {
        "bf16": False,
        "activation_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": LONGEST,
    }
    return _theirs(SFTTrainer, SFTConfig, setup, given, arguments)


def _theirs(
    kind: Any, config: Any, setup: Setup, given: dict[str, Any], arguments: dict[str, Any]
) -> Timeline:
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    timeline = Timeline()

    class Marks(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                timeline.mark(float(logs["loss"]))

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    side = InOrder(
        model=setup.model(),
        args=config(
            output_dir=str(setup.folder / kind.__name__),
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_grad_norm=1.0,
            remove_unused_columns=False,
            **arguments,
        ),
        callbacks=[Marks()],
        **given,
    )
    side.remove_callback(PrinterCallback)
    side.train()
    return timeline


def _rows(setup: Setup) -> list[dict[str, list[int]]]:
    documents = [setup.examples[number].documents[0] for number in setup.order]
    return [{"input_ids": d.input_ids.tolist(), "labels": d.labels.tolist()} for d in documents]


def _padded(rows: Any) -> dict[str, Any]:
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> Any:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def _tokenizer() -> Any:
    """TRL wants one, and asks it for nothing but the pad token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    names = {"pad_token": "<unk>", "eos_token": "<unk>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


# Measuring


def main(rounds: int, parts: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](rounds, Path(folder))


def _chats(rounds: int, folder: Path, kind: str, shape: dict[str, int]) -> None:
    setup = Setup(shape, examples(shape["vocab_size"], chat=True), folder)
    samples = _rates(setup, {"trainer": trainer, "ours": ours, "trl": trl}, rounds)
    _finish(samples, setup, f"train-trainer-{kind}", f"train-trl-{kind}")


def _control(rounds: int, folder: Path) -> None:
    setup = Setup(BODY, examples(BODY["vocab_size"], chat=False), folder)
    _finish(_rates(setup, {"trainer": trainer, "ours": ours}, rounds), setup, "train-control")


def _overhead(rounds: int, folder: Path) -> None:
    setup = Setup(BODY, examples(BODY["vocab_size"], chat=True), folder)

    def per_step(side: Callable[[Setup], Timeline]) -> float:
        timeline = side(setup)
        setup.check(timeline)
        return timeline.seconds / (STEPS - 1)

    sides = {"bare": lambda: per_step(bare), "ours": lambda: per_step(ours)}
    samples = harness.interleave(sides, rounds=rounds, say=harness.tell)
    _finish(samples, setup, "train-loop")


PARTS: dict[str, Callable[[int, Path], None]] = {
    "body": lambda rounds, folder: _chats(rounds, folder, "body", BODY),
    "head": lambda rounds, folder: _chats(rounds, folder, "head", HEAD),
    "control": _control,
    "loop": _overhead,
}


def _rates(
    setup: Setup, sides: dict[str, Callable[[Setup], Timeline]], rounds: int
) -> dict[str, list[float]]:
    def measured(side: Callable[[Setup], Timeline]) -> Callable[[], float]:
        return lambda: setup.rate(side(setup))

    timed = {name: measured(side) for name, side in sides.items()}
    return harness.interleave(timed, rounds=rounds, say=harness.tell)


def _finish(samples: dict[str, list[float]], setup: Setup, *keys: str) -> None:
    figures = [figure for figure in FIGURES if figure.key in keys]
    harness.finish(
        *(
            harness.conclude(figure, samples, steps=STEPS, tokens=setup.tokens, shape=setup.shape)
            for figure in figures
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:])
