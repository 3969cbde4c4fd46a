"""Text classification: one label per text, by encoders and by causal models with a scoring head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunery.entries import EntryConfig, Task
from tunery.errors import BaseModelUnavailable, InvalidConfig, InvalidData
from tunery.evaluation.classification import accuracy, macro_f1, weighted_f1

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
        Layout,
        LossOutput,
        MethodRun,
        TaskRuntime,
    )

_SCORERS = {"accuracy": accuracy, "macro_f1": macro_f1, "weighted_f1": weighted_f1}


class TextClassificationConfig(EntryConfig):
    """Nothing to set: the labels are the data's."""


class TextClassification:
    name: ClassVar[str] = "text-classification"
    title: ClassVar[str] = "Text classification"
    summary: ClassVar[str] = "One label per text, from a closed set."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = TextClassificationConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "text-classification"}
    formats: ClassVar[frozenset[str]] = frozenset({"classification"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", *_SCORERS)
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1")
    example_row: ClassVar[Mapping[str, Any]] = {"text": "You have won a prize!", "label": "spam"}

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime()


class Runtime:
    """A document and its class id in, cross entropy over the classes out."""

    smooths_labels = True
    peft_task_type: str | None = "SEQ_CLS"
    layouts: frozenset[Layout] = frozenset({"rows"})

    def __init__(self) -> None:
        self._heads: dict[int, nn.Module | None] = {}

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` with a classification head; label names go into its config.

        A head that the folder lacks is drawn from torch's default generator.

        Raises:
            BaseModelUnavailable: the folder does not hold a model that can classify.
            InvalidConfig: fewer than two labels.
        """
        from transformers import AutoModelForSequenceClassification

        if labels is None or len(labels) < 2:
            raise InvalidConfig(
                f"text-classification needs two labels or more, the data has {len(labels or ())}",
                code="too_few_labels",
                param="training_file",
            )
        try:
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=dtype,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={name: i for i, name in enumerate(labels)},
                problem_type="single_label_classification",
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
        except (OSError, ValueError) as error:
            raise BaseModelUnavailable(
                f"no classification model could be loaded ({type(error).__name__})",
                hint="import the base model again; `tunery models list` shows what is there",
            ) from error
        if model.config.pad_token_id is None:
            # transformers refuses a batch without one, though only its own pooling would use it.
            model.config.pad_token_id = model.config.eos_token_id or 0
        model.eval()  # type: ignore[no-untyped-call]
        return model

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        """The text as the tokenizer frames it ([CLS] … [SEP], BOS, nothing), cut at the right.

        Raises:
            InvalidData: the text has no tokens, or the label is not among the known ones.
        """
        import numpy as np

        from tunery.training.types import IGNORE, Document, Example

        ids = np.asarray(
            tokenizer(row["text"], truncation=True, max_length=options.max_length)["input_ids"],
            dtype=np.int32,
        )
        if not len(ids):
            raise InvalidData(f"row {index}: the text has no tokens", code="empty_text")
        document = Document(ids, np.full(len(ids), IGNORE, dtype=np.int32))
        return Example((document,), _class_id(row["label"], options.labels or (), index), index)

    def collate(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        from tunery.training.collate import collate

        return collate(examples, layout=layout, pad_id=pad_id, mask=True)

    def units(self, example: Example) -> float:
        """One: the loss is the mean over examples."""
        return 1.0

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum of the examples' cross entropies, in nats, and accuracy."""
        from torch.nn import functional

        from tunery.training.types import LossOutput

        logits_EC = self.logits(model, batch)
        assert batch.targets is not None
        smoothing = run.label_smoothing if model.training else 0.0
        loss = functional.cross_entropy(
            logits_EC, batch.targets, reduction="sum", label_smoothing=smoothing
        )
        predictions = logits_EC.detach().argmax(dim=1)
        correct = (predictions == batch.targets).sum().float()
        return LossOutput(
            loss=loss,
            sums={"accuracy": (correct, loss.new_full((), len(predictions)))},
            outcomes={} if model.training else {"scores": logits_EC},
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores of the classes, float32 (E, C).

        A decoder's score is read at each text's last real token by position. transformers looks for
        the last token that is not the pad token, which is another one where pad is also the stop
        token and the text ends with it.
        """
        head = self._scoring_head(model)
        if head is None:
            return model(**batch.inputs()).logits.float()  # type: ignore[no-any-return]
        caught: list[Tensor] = []
        handle = head.register_forward_hook(lambda _, __, scores_BTC: caught.append(scores_BTC))
        try:
            model(**batch.inputs(), use_cache=False)
        finally:
            handle.remove()
        return _at_last_token(caught[0], batch).float()

    def _scoring_head(self, model: nn.Module) -> nn.Module | None:
        """A decoder's `score`, which runs at every position; None for encoders."""
        if id(model) not in self._heads:
            named = dict(model.named_modules())
            heads = [path for path in named if path.rpartition(".")[2] == "score"]
            self._heads[id(model)] = named[min(heads, key=len)] if heads else None
        return self._heads[id(model)]

    def outcomes(
        self, model: nn.Module, batch: Batch, out: LossOutput, names: Sequence[str]
    ) -> dict[str, Tensor]:
        return out.outcomes

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per example; accuracy and the F1 means in 0..1."""
        truths = [int(outcome.example.target) for outcome in seen.outcomes]  # type: ignore[arg-type]
        predictions = [int(outcome.values["scores"].argmax()) for outcome in seen.outcomes]
        values = {"loss": seen.loss} if "loss" in names else {}
        for name in names:
            if name in _SCORERS and truths:
                values[name] = _SCORERS[name](truths, predictions)
        return values

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The likeliest label, the true one, and the probability of each."""
        import numpy as np

        for outcome in seen.outcomes:
            scores_C = outcome.values["scores"]
            shares_C = np.exp(scores_C - scores_C.max())
            shares_C /= shares_C.sum()
            yield {
                "row": outcome.example.row,
                "prediction": seen.labels[int(scores_C.argmax())],
                "label": seen.labels[int(outcome.example.target)],  # type: ignore[arg-type]
                "probabilities": dict(zip(seen.labels, shares_C.round(6).tolist(), strict=True)),
            }


def _class_id(label: Any, labels: tuple[str, ...], index: int) -> int:
    """The label's place among the names; a number is a name too."""
    try:
        return labels.index(str(label))
    except ValueError:
        raise InvalidData(
            f"row {index}: its label is none of the {len(labels)} known ones",
            code="unknown_label",
        ) from None


def _at_last_token(scores_BTC: Tensor, batch: Batch) -> Tensor:
    """(E, C): prompt tuning makes rows longer in front, padding stands on the right."""
    import torch

    rows, given = batch.input_ids.shape
    in_front = scores_BTC.shape[1] - given
    if batch.attention_mask is None:
        return scores_BTC[:, -1]
    last_B = batch.attention_mask.sum(dim=1) - 1 + in_front
    return scores_BTC[torch.arange(rows, device=last_B.device), last_B]


ENTRY: type[Task] = TextClassification
