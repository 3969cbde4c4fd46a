"""Supervised fine-tuning: make the given answers likely."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.errors import UnsupportedCombination
from tunery.methods._neftune import noisy_embeddings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective


class SupervisedConfig(Hyperparameters):
    train_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="Tokens that are learnt: the assistant's replies (of prompt/completion rows, "
        "the completions) with their end-of-turn token, or all.",
    )
    label_smoothing_factor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each target that is spread evenly over the whole vocabulary (of "
        "classification, over the labels). Evaluations are without it.",
    )
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="NEFTune: noise on the embeddings while training, uniform between plus and "
        "minus this divided by the square root of tokens times hidden size; 5 to 15 are common.",
    )


class Supervised:
    name: ClassVar[str] = "supervised"
    title: ClassVar[str] = "Supervised"
    summary: ClassVar[str] = "Learns from examples of the wanted answers."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = SupervisedConfig
    formats: ClassVar[frozenset[str] | None] = None
    tasks: ClassVar[frozenset[str] | None] = None
    learning_rate_factor: ClassVar[float] = 1.0
    example: ClassVar[Mapping[str, Any]] = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}},
    }
    example_row: ClassVar[Mapping[str, Any]] = {
        "messages": [
            {"role": "user", "content": "Is the shop open on Sunday?"},
            {"role": "assistant", "content": "Yes, from ten to four."},
        ]
    }

    def objective(self, config: SupervisedConfig, run: MethodRun) -> Objective:
        """Maximum likelihood, as the task defines it.

        Raises:
            UnsupportedCombination: labels are to be smoothed and the task's loss does not do that.
        """
        smoothing = config.label_smoothing_factor
        if smoothing and not getattr(run.task, "smooths_labels", False):
            raise UnsupportedCombination(
                "this task's loss takes no label_smoothing_factor", hint="leave it out"
            )
        return _Likelihood(replace(run, label_smoothing=smoothing), config.neftune_noise_alpha)


class _Likelihood:
    def __init__(self, run: MethodRun, noise_alpha: float | None) -> None:
        self._run = run
        self._noise_alpha = noise_alpha

    def units(self, example: Example) -> float:
        return self._run.task.units(example)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """The untrained model has nothing to say here."""

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        if self._noise_alpha is None or not model.training:
            return self._run.task.supervised_loss(model, batch, self._run)
        with noisy_embeddings(model, batch, self._noise_alpha):
            return self._run.task.supervised_loss(model, batch, self._run)


ENTRY: type[Method] = Supervised
