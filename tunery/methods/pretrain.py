"""Continued pre-training: make plain text likely, all of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import Hyperparameters, Method

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective


class PretrainConfig(Hyperparameters):
    n_epochs: float = Field(1, gt=0, le=100, description="Passes over the training file.")
    max_length: int = Field(
        1024, ge=8, le=1_048_576, description="Tokens of an example. Longer texts become several."
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=4096,
        description="Examples per optimizer step, over all devices: of max_length tokens each, "
        "whatever the rows' lengths.",
    )
    packing_strategy: Literal["wrapped", "bfd_split"] = Field(
        "wrapped",
        description="How texts fill examples. `wrapped`: all texts, a stop token after each, are "
        "one stream that is cut every max_length tokens; a text sees those before it in its "
        "example. `bfd_split`: texts longer than max_length are cut, pieces share an example where "
        "they fit, and none sees another. No token is dropped either way.",
    )


class Pretrain:
    name: ClassVar[str] = "pretrain"
    title: ClassVar[str] = "Continued pre-training"
    summary: ClassVar[str] = "Goes on learning the next token of plain text, all of it."
    paper: ClassVar[str | None] = (
        "Gururangan et al.: Don't Stop Pretraining: Adapt Language Models to Domains and Tasks, "
        "2020, arXiv 2004.10964"
    )
    Config: ClassVar[type[EntryConfig]] = PretrainConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"text"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"text-generation"})
    learning_rate_factor: ClassVar[float] = 0.5
    example: ClassVar[Mapping[str, Any]] = {
        "type": "pretrain",
        "pretrain": {"hyperparameters": {"max_length": 1024, "packing_strategy": "wrapped"}},
    }
    example_row: ClassVar[Mapping[str, Any]] = {
        "text": "The shop in the old mill opens at ten. On Sundays it closes at four."
    }

    def examples(self, tokens: float, max_length: int) -> int:
        """Full ones; a last, shorter one counts."""
        return max(1, math.ceil(tokens / max_length))

    def objective(self, config: PretrainConfig, run: MethodRun) -> Objective:
        """Maximum likelihood of examples that are made of the rows' texts."""
        return _Stream(config, run)


class _Stream:
    def __init__(self, config: PretrainConfig, run: MethodRun) -> None:
        self._config = config
        self._run = run
        self.grouping = f"{config.packing_strategy}-{config.max_length}"

    def regroup(self, examples: Iterable[Example]) -> Iterator[Example]:
        from tunery.training.blocks import fitted, wrapped

        group = wrapped if self._config.packing_strategy == "wrapped" else fitted
        return group(examples, self._config.max_length)

    def units(self, example: Example) -> float:
        return self._run.task.units(example)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """The untrained model has nothing to say here."""

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        return self._run.task.supervised_loss(model, batch, self._run)


ENTRY: type[Method] = Pretrain
