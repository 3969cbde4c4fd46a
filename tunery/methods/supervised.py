"""Supervised fine-tuning: make the given answers likely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import Hyperparameters, Method

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

    def objective(self, config: Any, run: MethodRun) -> Objective:
        """Maximum likelihood, as the task defines it."""
        return _Likelihood(run)


class _Likelihood:
    def __init__(self, run: MethodRun) -> None:
        self._run = run

    def units(self, example: Example) -> float:
        return self._run.task.units(example)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """The untrained model has nothing to say here."""

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        return self._run.task.supervised_loss(model, batch, self._run)


ENTRY: type[Method] = Supervised
