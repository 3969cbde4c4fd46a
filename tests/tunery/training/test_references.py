"""The same run by `transformers.Trainer`, by TRL and by us: the same losses, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from tunery.training import batching

if TYPE_CHECKING:
    from pathlib import Path

STEPS, BATCH, MICRO = 6, 4, 2


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


class Rows(Dataset):  # type: ignore[type-arg]
    """Examples in the order that our loop draws them in."""

    def __init__(self, examples: Any, order: Any) -> None:
        self.rows = [
            {
                "input_ids": examples[i].documents[0].input_ids.tolist(),
                "labels": examples[i].documents[0].labels.tolist(),
            }
            for i in order
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return self.rows[number]


def padded(rows: Any) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def order_of(count: int) -> list[int]:
    return np.concatenate(
        [batching.global_batch(count, BATCH, 3, step) for step in range(STEPS)]
    ).tolist()


def settings(kind: Any, folder: Path, **overrides: Any) -> Any:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 1.0,
        "remove_unused_columns": False,
        **overrides,
    }
    return kind(**values)


@pytest.mark.filterwarnings("default")
def test_losses_are_those_of_transformers_trainer(lab: Any, tmp_path: Path) -> None:
    examples = lab.examples(12)
    ours_loop, ours = lab.loop(lab.lora(), examples, steps=STEPS, batch_size=BATCH)
    ours_loop.run()
    heard = Losses()

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    model = lab.lora()
    InOrder(
        model=model,
        args=settings(TrainingArguments, tmp_path / "trainer"),
        train_dataset=Rows(examples, order_of(12)),
        data_collator=padded,
        callbacks=[heard],
    ).train()
    assert heard.values == pytest.approx(ours.series("train_loss"), abs=1e-5)
    assert heard.values[0] - heard.values[-1] > 0.05, "nothing was learnt"
    theirs = dict(model.named_parameters())
    for name, parameter in ours_loop.engine.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("default")
def test_losses_are_those_of_trl(
    lab: Any, tmp_path: Path, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets = pytest.importorskip("datasets")
    from trl import SFTConfig, SFTTrainer

    examples = lab.examples(12)
    ours_loop, ours = lab.loop(
        lab.lora(lab.llama(vocab_size=261)), examples, steps=STEPS, batch_size=BATCH
    )
    ours_loop.run()
    heard = Losses()

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    tokenizer = make_tokenizer(None)
    tokenizer.pad_token = "<unk>"
    arguments = settings(
        SFTConfig,
        tmp_path / "trl",
        bf16=False,
        activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=128,
    )
    InOrder(
        model=lab.lora(lab.llama(vocab_size=261)),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(Rows(examples, order_of(12)).rows),
        processing_class=tokenizer,
        callbacks=[heard],
    ).train()
    assert heard.values == pytest.approx(ours.series("train_loss"), abs=1e-5)
