"""Text regression: a number per text or pair, such as a grade or a similarity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from tunery.entries import EntryConfig, Task
from tunery.evaluation.correlation import (
    mean_absolute_error,
    mean_squared_error,
    pearson,
    spearman,
)
from tunery.tasks._sequences import Sequences

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


class TextRegressionConfig(EntryConfig):
    """Nothing to set: numbers are learnt as they stand."""


class TextRegression:
    name: ClassVar[str] = "text-regression"
    title: ClassVar[str] = "Text regression"
    summary: ClassVar[str] = "A number per text, or pair of texts: a grade, a similarity."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = TextRegressionConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "text-regression"}
    formats: ClassVar[frozenset[str]] = frozenset({"regression", "similarity"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", "mse", "rmse", "mae", "pearson", "spearman")
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "mse", "pearson", "spearman")
    example_row: ClassVar[Mapping[str, Any]] = {"text": "Well argued, badly typed.", "target": 3.5}

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime()


class Runtime(Sequences):
    """A document and its number in, squared error out."""

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
        """See `Sequences.document`; the target is a float32 scalar.

        Raises:
            InvalidData: the text has no tokens.
        """
        import numpy as np

        from tunery.training.types import Example

        if options.format == "similarity":
            row = {"text": row["sentence1"], "text_pair": row["sentence2"], "target": row["score"]}
        document = self.document(row, tokenizer, options.max_length, index)
        return Example((document,), np.asarray(row["target"], dtype=np.float32), index)

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum of the squared errors."""
        from torch.nn import functional

        from tunery.training.types import LossOutput

        said_E = self.logits(model, batch)[:, 0]
        assert batch.targets is not None
        loss = functional.mse_loss(said_E, batch.targets, reduction="sum")
        return LossOutput(loss=loss, outcomes={} if model.training else {"said": said_E})

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` and `mse` in squared units of the target, rmse and mae in its units."""
        values = {"loss": seen.loss}
        if seen.outcomes:
            truths = [float(outcome.example.target) for outcome in seen.outcomes]  # type: ignore[arg-type]
            said = [float(outcome.values["said"]) for outcome in seen.outcomes]
            mse = mean_squared_error(truths, said)
            values |= {
                "mse": mse,
                "rmse": math.sqrt(mse),
                "mae": mean_absolute_error(truths, said),
                "pearson": pearson(truths, said),
                "spearman": spearman(truths, said),
            }
        return {name: values[name] for name in names if name in values}

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The number that was said and the true one."""
        for outcome in seen.outcomes:
            yield {
                "row": outcome.example.row,
                "prediction": float(outcome.values["said"]),
                "label": float(outcome.example.target),  # type: ignore[arg-type]
            }


ENTRY: type[Task] = TextRegression
