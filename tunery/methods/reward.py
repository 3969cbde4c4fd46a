"""Reward models by Bradley and Terry's model of comparisons.

    loss = -log sigmoid(s(w) - s(l) - margin) + c (s(w) + s(l))^2

The margin is the row's, 0 where it has none. c keeps scores near 0, which nothing else does: only
differences are learnt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.methods import _preference
from tunery.tasks.reward_modeling import bradley_terry, score_sums

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective


class RewardConfig(Hyperparameters):
    n_epochs: float = Field(1, gt=0, le=100, description="Passes over the training file.")
    learning_rate: float = Field(1e-4, gt=0, le=10, description="Peak learning rate of AdamW.")
    center_rewards_coefficient: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Weight of the squared sum of a pair's scores, which keeps them near 0; 0.01 "
        "is common.",
    )
    disable_dropout: bool = Field(
        True, description="Turn all dropout off, so that both replies are scored by one model."
    )


class Reward:
    name: ClassVar[str] = "reward"
    title: ClassVar[str] = "Reward model"
    summary: ClassVar[str] = "Learns to score replies from pairs of a preferred and another one."
    paper: ClassVar[str | None] = (
        "Bradley and Terry: Rank Analysis of Incomplete Block Designs, 1952; centred after "
        "Eisenstein et al., 2023, arXiv 2312.09244"
    )
    Config: ClassVar[type[EntryConfig]] = RewardConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"preference"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"reward-modeling"})
    learning_rate_factor: ClassVar[float] = 0.5
    example: ClassVar[Mapping[str, Any]] = {
        "type": "reward",
        "reward": {"hyperparameters": {"center_rewards_coefficient": 0.01}},
    }
    example_row: ClassVar[Mapping[str, Any]] = {**_preference.EXAMPLE_ROW, "margin": 0.5}

    def objective(self, config: RewardConfig, run: MethodRun) -> Objective:
        """The task's scores, compared."""
        return _Comparison(config, run)


ENTRY: type[Method] = Reward


class _Comparison:
    def __init__(self, config: RewardConfig, run: MethodRun) -> None:
        self._config = config
        self._task: Any = run.task

    def units(self, example: Example) -> float:
        """One for each pair of two replies: the loss is the mean over them.

        Raises:
            InvalidConfig: the example is not a pair.
        """
        return _preference.pair_units(example)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Turn dropout off; there is no reference."""
        if self._config.disable_dropout:
            _preference.no_dropout(model)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's pairs, and TRL's names for what scores are looked at by."""
        from tunery.training.types import LossOutput

        scores_E2 = self._task.scores(model, batch)
        whole_E = _preference.whole(batch)
        loss = (bradley_terry(scores_E2, batch.targets) * whole_E).sum()
        if self._config.center_rewards_coefficient:
            squares = (scores_E2.sum(dim=1).square() * whole_E).sum()
            loss = loss + self._config.center_rewards_coefficient * squares
        return LossOutput(
            loss=loss,
            sums=score_sums(scores_E2, whole_E),
            outcomes={} if model.training else {"scores": scores_E2},
        )
