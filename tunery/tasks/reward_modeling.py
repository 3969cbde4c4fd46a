"""Reward modelling: a score per reply, learnt from which of two was preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunery.entries import EntryConfig, Task
from tunery.errors import InvalidData
from tunery.tasks._sequences import Sequences

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import (
        Batch,
        EncodeOptions,
        Evaluated,
        Example,
        LossOutput,
        MethodRun,
        Sums,
        TaskRuntime,
    )


class RewardModelingConfig(EntryConfig):
    """Nothing to set: which reply was preferred is the data's."""


class RewardModeling:
    name: ClassVar[str] = "reward-modeling"
    title: ClassVar[str] = "Reward modelling"
    summary: ClassVar[str] = "A score per reply, such that preferred replies score higher."
    paper: ClassVar[str | None] = (
        "Ouyang et al.: Training language models to follow instructions with human feedback, 2022, "
        "arXiv 2203.02155"
    )
    Config: ClassVar[type[EntryConfig]] = RewardModelingConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "reward-modeling"}
    formats: ClassVar[frozenset[str]] = frozenset({"preference"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin", "mean_reward")
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")
    example_row: ClassVar[Mapping[str, Any]] = {
        "input": {"messages": [{"role": "user", "content": "Name a prime above ten."}]},
        "preferred_output": [{"role": "assistant", "content": "Eleven."}],
        "non_preferred_output": [{"role": "assistant", "content": "Twelve, I think."}],
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime()


class Runtime(Sequences):
    """Two documents, prompt and reply each; how sure it is which was preferred."""

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` with a head of one score.

        Raises:
            BaseModelUnavailable: the folder does not hold a model that can score.
        """
        return self.load(path, dtype=dtype, num_labels=1, problem_type="regression", **options)

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        """Preferred and other conversation; the target is the row's `margin`, float32, or 0.

        Raises:
            InvalidData: cannot be rendered, or the margin is no number.
        """
        from dataclasses import replace

        import numpy as np

        from tunery.training.encoding import encode_row

        margin = row.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise InvalidData(f"row {index}: margin must be a number", code="wrong_type")
        pair = encode_row(row, tokenizer, options, index)
        return replace(pair, target=np.asarray(margin, dtype=np.float32))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the preferred replies and the others: float32 (E, 2)."""
        return self.logits(model, batch).view(-1, 2)

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum over pairs, as Bradley and Terry's model of comparisons has it."""
        from tunery.training.types import LossOutput

        scores_E2 = self.scores(model, batch)
        return LossOutput(
            loss=bradley_terry(scores_E2, batch.targets).sum(),
            sums=score_sums(scores_E2),
            outcomes={} if model.training else {"scores": scores_E2},
        )

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """Loss in nats per pair; accuracy is the share of pairs in the right order."""
        known = {"loss": seen.loss, **seen.sums}
        return {name: known[name] for name in names if name in known}

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """Both scores."""
        for outcome in seen.outcomes:
            chosen, rejected = outcome.values["scores"].tolist()
            yield {
                "row": outcome.example.row,
                "preferred_score": chosen,
                "non_preferred_score": rejected,
            }


def bradley_terry(scores_E2: Tensor, margin_E: Tensor | None = None) -> Tensor:
    """-log sigmoid(s_w - s_l - margin) of each pair, in nats: float32 (E,)."""
    from torch.nn import functional

    lead_E = scores_E2[:, 0] - scores_E2[:, 1]
    return -functional.logsigmoid(lead_E if margin_E is None else lead_E - margin_E)


def score_sums(scores_E2: Tensor, counts_E: Tensor | None = None) -> Sums:
    """TRL's metrics of scored pairs: of all, or of those that count."""
    chosen, rejected = scores_E2.detach().unbind(1)
    weight_E = chosen.new_ones(len(chosen)) if counts_E is None else counts_E.float()
    values = {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "mean_reward": (chosen + rejected) / 2,
    }
    return {name: ((value * weight_E).sum(), weight_E.sum()) for name, value in values.items()}


ENTRY: type[Task] = RewardModeling
