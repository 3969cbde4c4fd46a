"""Multi-label classification: any number of labels per text or pair, each decided by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Task
from tunery.evaluation.classification import label_sets
from tunery.tasks._headed import need_two
from tunery.tasks._sequences import Sequences, label_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import (
        Batch,
        EncodeOptions,
        Evaluated,
        Example,
        LossOutput,
        MethodRun,
        Outcome,
        TaskRuntime,
    )


class MultiLabelClassificationConfig(EntryConfig):
    threshold: float = Field(
        0.5, gt=0, lt=1, description="Probability from which on a label counts as given."
    )


class MultiLabelClassification:
    name: ClassVar[str] = "multi-label-classification"
    title: ClassVar[str] = "Multi-label classification"
    summary: ClassVar[str] = "Any number of labels per text, or pair of texts, from a closed set."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = MultiLabelClassificationConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "multi-label-classification", "threshold": 0.5}
    formats: ClassVar[frozenset[str]] = frozenset({"multi_label"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", "micro_f1", "macro_f1", "subset_accuracy")
    default_metrics: ClassVar[tuple[str, ...]] = metrics
    example_row: ClassVar[Mapping[str, Any]] = {
        "text": "The battery died and nobody answers.",
        "labels": ["hardware", "support"],
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime(config or MultiLabelClassificationConfig())


class Runtime(Sequences):
    """A document and its labels as 0 and 1 in, binary cross entropies out."""

    def __init__(self, config: MultiLabelClassificationConfig) -> None:
        super().__init__()
        self._threshold = config.threshold

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` with a classification head; label names go into its config.

        Raises:
            BaseModelUnavailable: the folder does not hold a model that can classify.
            InvalidConfig: fewer than two labels.
        """
        return self.load(
            path,
            dtype=dtype,
            labels=need_two(labels, "multi-label-classification"),
            problem_type="multi_label_classification",
            **options,
        )

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        """See `Sequences.document`; the target is float32 (C,), 1 at the row's labels.

        Raises:
            InvalidData: the text has no tokens, or a label is not among the known ones.
        """
        import numpy as np

        from tunery.training.types import Example

        labels = options.labels or ()
        target = np.zeros(len(labels), dtype=np.float32)
        target[[label_id(label, labels, index) for label in row["labels"]]] = 1
        return Example((self.document(row, tokenizer, options.max_length, index),), target, index)

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum over examples of the mean binary cross entropy of the labels, in nats."""
        from torch.nn import functional

        from tunery.training.types import LossOutput

        logits_EC = self.logits(model, batch)
        assert batch.targets is not None
        losses_EC = functional.binary_cross_entropy_with_logits(
            logits_EC, batch.targets, reduction="none"
        )
        outcomes = {} if model.training else {"probabilities": logits_EC.sigmoid()}
        return LossOutput(loss=losses_EC.mean(dim=1).sum(), outcomes=outcomes)

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per example and label; F1 over all decisions (micro), mean of the labels'
        F1 (macro), and share of examples with all labels right, in 0..1."""
        values = {"loss": seen.loss}
        if seen.outcomes:
            truths = [_given(outcome.example.target) for outcome in seen.outcomes]
            scores = label_sets(truths, list(map(self._said, seen.outcomes)), len(seen.labels))
            values |= {
                "micro_f1": scores.micro_f1,
                "macro_f1": scores.macro_f1,
                "subset_accuracy": scores.subset_accuracy,
            }
        return {name: values[name] for name in names if name in values}

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The labels that are given, the true ones, and the probability of each."""
        for outcome in seen.outcomes:
            shares_C = outcome.values["probabilities"].astype(float).round(6).tolist()
            yield {
                "row": outcome.example.row,
                "prediction": [seen.labels[i] for i in sorted(self._said(outcome))],
                "label": [seen.labels[i] for i in sorted(_given(outcome.example.target))],
                "probabilities": dict(zip(seen.labels, shares_C, strict=True)),
            }

    def _said(self, outcome: Outcome) -> frozenset[int]:
        return _given(outcome.values["probabilities"] >= self._threshold)


def _given(target_C: Any) -> frozenset[int]:
    return frozenset(target_C.nonzero()[0].tolist())


ENTRY: type[Task] = MultiLabelClassification
