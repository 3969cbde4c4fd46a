"""Text classification: one label per text or pair, by encoders and by causal models with a head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunery.entries import EntryConfig, Task
from tunery.evaluation.classification import accuracy, macro_f1, weighted_f1
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
        TaskRuntime,
    )

SCORERS = {"accuracy": accuracy, "macro_f1": macro_f1, "weighted_f1": weighted_f1}


class TextClassificationConfig(EntryConfig):
    """Nothing to set: the labels are the data's."""


class TextClassification:
    name: ClassVar[str] = "text-classification"
    title: ClassVar[str] = "Text classification"
    summary: ClassVar[str] = "One label per text, or pair of texts, from a closed set."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = TextClassificationConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "text-classification"}
    formats: ClassVar[frozenset[str]] = frozenset({"classification"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", *SCORERS)
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1")
    example_row: ClassVar[Mapping[str, Any]] = {"text": "You have won a prize!", "label": "spam"}

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime()


class Runtime(Sequences):
    """A document and its class id in, cross entropy over the classes out."""

    smooths_labels: bool = True

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
            labels=need_two(labels, "text-classification"),
            problem_type="single_label_classification",
            **options,
        )

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        """See `Sequences.document`.

        Raises:
            InvalidData: the text has no tokens, or the label is not among the known ones.
        """
        from tunery.training.types import Example

        document = self.document(row, tokenizer, options.max_length, index)
        return Example((document,), label_id(row["label"], options.labels or (), index), index)

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum of the examples' cross entropies, in nats, and accuracy."""
        return class_loss(self.logits(model, batch), batch, run, training=model.training)

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per example; accuracy and the F1 means in 0..1."""
        return class_metrics(names, seen)

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The likeliest label, the true one, and the probability of each."""
        return class_predictions(seen)


def class_loss(logits_EC: Any, batch: Batch, run: MethodRun, *, training: bool) -> LossOutput:
    """Sum of the examples' cross entropies, in nats, and accuracy."""
    from torch.nn import functional

    from tunery.training.types import LossOutput

    assert batch.targets is not None
    smoothing = run.label_smoothing if training else 0.0
    loss = functional.cross_entropy(
        logits_EC, batch.targets, reduction="sum", label_smoothing=smoothing
    )
    predictions = logits_EC.detach().argmax(dim=1)
    correct = (predictions == batch.targets).sum().float()
    return LossOutput(
        loss=loss,
        sums={"accuracy": (correct, loss.new_full((), len(predictions)))},
        outcomes={} if training else {"scores": logits_EC},
    )


def class_metrics(names: Sequence[str], seen: Evaluated) -> dict[str, float]:
    """`loss` in nats per example; accuracy and the F1 means in 0..1."""
    truths = [int(outcome.example.target) for outcome in seen.outcomes]  # type: ignore[arg-type]
    predictions = [int(outcome.values["scores"].argmax()) for outcome in seen.outcomes]
    values = {"loss": seen.loss} if "loss" in names else {}
    for name in names:
        if name in SCORERS and truths:
            values[name] = SCORERS[name](truths, predictions)
    return values


def class_predictions(seen: Evaluated) -> Iterator[dict[str, Any]]:
    """The likeliest label, the true one, and the probability of each."""
    import numpy as np

    for outcome in seen.outcomes:
        scores_C = outcome.values["scores"].astype(float)
        shares_C = np.exp(scores_C - scores_C.max())
        shares_C /= shares_C.sum()
        yield {
            "row": outcome.example.row,
            "prediction": seen.labels[int(scores_C.argmax())],
            "label": seen.labels[int(outcome.example.target)],  # type: ignore[arg-type]
            "probabilities": dict(zip(seen.labels, shares_C.round(6).tolist(), strict=True)),
        }


ENTRY: type[Task] = TextClassification
