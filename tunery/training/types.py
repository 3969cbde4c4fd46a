"""The torch-side halves of a run: what entries are handed, and what they hand back.

How a row becomes a step:

    row --TaskRuntime.encode--> Example (1 or more Documents) --collate--> Batch
        --Objective.loss--> LossOutput (a SUM) --loop--> / normaliser of the whole optimizer step

Axes: B rows of a micro-batch, T positions of a row, S supervised positions of the micro-batch,
D documents, E examples, C classes, V vocabulary. Importing this module loads numpy and torch;
entries import from it under `TYPE_CHECKING` or inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.entries import DataFormat

IGNORE = -100
"""Label of a position that is not supervised, as everywhere in transformers."""
TAGS = "tags"
"""The track of class ids of the tokens themselves."""
DISCOUNTS = "discounts"
"""The track of what is taken off each supervised token's weight: float32, 0..1."""

Layout = Literal["rows", "packed"]
"""rows: a document per row, padded on the right. packed: one row, documents end to end, positions
restarting, attention kept apart by `Batch.cu_seqlens`; needs an attention that honours them."""

Sums = dict[str, tuple["Tensor", "Tensor"]]
"""Metric name to (sum, count), device scalars without graph; the metric is sum / count."""


@dataclass(frozen=True, slots=True)
class Document:
    """One token sequence that attends only to itself.

    Attributes:
        input_ids: int32, shape (T,).
        labels: int32, shape (T,): the token itself where it is supervised, else `IGNORE`. Not
            shifted; `labels[0]` is never learnt, there is nothing to predict it from.
        weight: multiplies the loss of each of its supervised tokens, and counts as much in the
            normaliser.
        tracks: further arrays with an entry per token, shape (T,), by name: `tags`, see below,
            `discounts`, or an argument of the model such as `token_type_ids`; 0 where a document
            has none.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    weight: float = 1.0
    tracks: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def tags(self) -> np.ndarray | None:
        """Class id of each token itself, `IGNORE` where it has none: int, (T,); not shifted."""
        return self.tracks.get(TAGS)

    @property
    def supervised(self) -> int:
        """Number of tokens that are predicted, or classified, and scored."""
        scored = self.labels[1:] if self.tags is None else self.tags
        return int((scored != IGNORE).sum())

    @property
    def weighted(self) -> float:
        """The predicted tokens, each counted by its weight."""
        if DISCOUNTS not in self.tracks:
            return self.supervised * self.weight
        kept = 1 - self.tracks[DISCOUNTS][1:][self.labels[1:] != IGNORE]
        return float(kept.sum(dtype=np.float64)) * self.weight


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the data file, encoded: the unit of a batch, never split over micro-batches.

    Attributes:
        documents: one for supervised tasks; (preferred, non-preferred) for preference rows.
        target: class id for classification; an array of one shape over the file for what else
            belongs to the whole example, such as a number, a multi-hot vector or a span; None
            where the labels are tokens.
        index: row number in its file, from 0, or -1, -2, ... for held-out rows; names the row
            wherever the example is spoken of.
        arrays: further arrays by name, of any shape: pixel values, audio features, places of the
            tokens in the text. All examples of a file have the same names.
    """

    documents: tuple[Document, ...]
    target: int | np.ndarray | None
    index: int
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def row(self) -> int:
        """Row number in its file, from 0; held-out rows have indices -1, -2, ..."""
        return self.index if self.index >= 0 else -1 - self.index

    @property
    def tokens(self) -> int:
        """Real tokens of all documents."""
        return sum(len(document.input_ids) for document in self.documents)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(len(document.input_ids) for document in self.documents)


@dataclass(slots=True)
class Batch:
    """One micro-batch. Host numbers are Python ints; nothing here needs a device read.

    The supervised positions are laid out flat, whatever the layout: hidden state
    `hidden.view(-1, H)[target_positions]` predicts `target_ids`.
    """

    input_ids: Tensor
    """int64 (B, T)."""
    attention_mask: Tensor | None
    """int64 (B, T), 1 at real tokens; None where no mask is needed: no padding, or a causal model
    with padding on the right, where no real token can see it."""
    position_ids: Tensor | None
    """int64 (B, T); None means 0, 1, 2, ... in every row."""
    cu_seqlens: Tensor | None
    """int32 (D+1,): starts of the documents in a packed row; None for rows."""
    max_seqlen: int
    """Longest document, in tokens."""
    target_positions: Tensor
    """int64 (S,): flat positions in (B*T) whose next token is supervised."""
    target_ids: Tensor
    """int64 (S,): that next token."""
    target_weights: Tensor | None
    """float32 (S,); None means all 1."""
    target_documents: Tensor
    """int64 (S,): the document, 0..D-1, that each belongs to. Documents keep the examples' order:
    with two documents per example, 2e is example e's first and 2e+1 its second."""
    targets: Tensor | None
    """int64 (E,): class ids, or the examples' target arrays, (E, ...); None where the labels are
    tokens."""
    indices: tuple[int, ...]
    """`Example.index` of each example, length E."""
    documents: int
    """D."""
    tokens: int
    """Real tokens, padding not counted."""
    supervised: int
    """S."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What else a task's model wants, by argument name."""
    tags: Tensor | None = None
    """int64 (B, T): class ids of the tokens themselves, `IGNORE` where there are none."""
    lengths: Tensor | None = None
    """int64 (D,): tokens of each document; None where the documents are not the model's input."""
    feeds_tokens: bool = True
    """Whether the tokens are the model's input; else all that it reads is in `extras`."""

    @property
    def width(self) -> int:
        """Positions of a row of the model's answer, which `target_positions` count: those of the
        decoder's tokens where a decoder has its own."""
        return int(self.extras.get("decoder_input_ids", self.input_ids).shape[1])

    def to(self, device: torch.device) -> Batch:
        """The same batch there; the copy does not block when the tensors are pinned."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        moved["extras"] = {k: v.to(device, non_blocking=True) for k, v in self.extras.items()}
        return replace(self, **moved)

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU do not block."""
        moved: dict[str, Any] = {
            f.name: value.pin_memory()
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        moved["extras"] = {name: value.pin_memory() for name, value in self.extras.items()}
        return replace(self, **moved)

    def document_tokens(self) -> Tensor:
        """Supervised tokens of each document: float32 (D,)."""
        return document_sums(self, torch.ones_like(self.target_ids, dtype=torch.float32))

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        tokens = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        given = {**(tokens if self.feeds_tokens else {}), **self.extras}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(slots=True)
class TokenLosses:
    """What the model says about the supervised tokens of a batch.

    Attributes:
        nll: (S,), negative log-likelihood of each, in nats, float32, with graph; not weighted.
            Under label smoothing e, (1 - e) of it and e of the vocabulary's mean.
        correct: (S,), float32 without graph: 1 where the token was the most likely one.
    """

    nll: Tensor
    correct: Tensor

    def document_logprobs(self, batch: Batch) -> Tensor:
        """Summed log-probability of each document's supervised tokens: float32 (D,), with graph."""
        return document_sums(batch, -self.nll)


def document_sums(batch: Batch, values_S: Tensor) -> Tensor:
    """Sums over each document's supervised tokens: float32 (D,)."""
    zeros = torch.zeros(batch.documents, dtype=torch.float32, device=values_S.device)
    return zeros.index_add(0, batch.target_documents, values_S)


@dataclass(slots=True)
class LossOutput:
    """A micro-batch's share of the optimizer step. Device tensors; never read with `.item()`.

    Attributes:
        loss: scalar float32 with graph: the SUM over the batch's normaliser units (weighted tokens,
            pairs, examples). The loop divides by the units of the whole optimizer step, over all
            micro-batches and ranks, so that how a step is cut never changes its gradient.
        sums: metrics, such as `mean_token_accuracy` or `rewards/margins`.
        outcomes: what is to be kept of each example of an evaluated batch, by name; first axis E.
            Empty in training.
    """

    loss: Tensor
    sums: Sums = field(default_factory=dict)
    outcomes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one evaluated example.

    Attributes:
        example: as it was encoded.
        values: its row of each of the batch's `TaskRuntime.outcomes`, on the host.
    """

    example: Example
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """All that an evaluation saw, over all ranks.

    Attributes:
        loss: mean over units.
        sums: the means of `LossOutput.sums`.
        outcomes: of all examples, in the order of the file; empty where the task keeps none.
        tokenizer: None only where no task's text is at stake, as in tests of the loop.
        labels: class names in id order.
    """

    loss: float
    sums: Mapping[str, float] = field(default_factory=dict)
    outcomes: Sequence[Outcome] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    labels: tuple[str, ...] = ()


class Objective(Protocol):
    """What a method gives: batch in, summed loss and metrics out."""

    def units(self, example: Example) -> float:
        """The example's part of the loss's denominator: its weighted supervised tokens, or 1."""
        ...

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Called once before the first step and before any resumed weights are loaded.

        `batches` are the micro-batches of all training and validation examples, already on the
        device, drawn lazily: an objective that needs nothing from the untrained model leaves them
        alone. Training examples have `Batch.indices` 0, 1, ...; validation examples -1, -2, ...
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """`model` is called like the transformers model; it may be wrapped by an engine."""
        ...


@runtime_checkable
class SeesSteps(Protocol):
    """An `Objective` whose loss depends on the whole step, of which a micro-batch is a part.

    It must not depend on how the step is cut: what a loss needs beside its own batch is told here.
    """

    def begin(self, examples: Iterable[Example]) -> None:
        """Called before the losses of a step, or of an evaluation, with all of its examples, on
        every rank alike."""
        ...


@runtime_checkable
class AsksModel(Protocol):
    """An `Objective` that asks the model as it is now, without graph, before a step's losses."""

    def questions(self, examples: Iterable[Example]) -> Sequence[Example]:
        """What to ask for a step, or an evaluation, with these examples: the same on all ranks."""
        ...

    def answers(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over a micro-batch of questions: float32 (K,)."""
        ...

    def told(self, totals: Sequence[float]) -> None:
        """The K sums over all questions and ranks."""
        ...


@runtime_checkable
class Regroups(Protocol):
    """An `Objective` that makes its own examples of the encoded rows, which come to it whole."""

    grouping: str
    """Names all that decides it: equal names, equal examples."""

    def regroup(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Other examples of the same documents, drawn lazily."""
        ...


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How rows become examples. Equal options, equal tokens: they are part of the cache's key.

    Attributes:
        format: of the rows.
        max_length: tokens a document may have; what is over is cut off at the right.
        train_on: which tokens of a chat or prompt_completion row are supervised. none: the row is
            a prompt, encoded up to where the reply begins; of one that is too long the end is kept.
        labels: class names in id order, classification only.
        chat_template: overrides the tokenizer's own; its hash is recorded.
        whole: rows are encoded whole, whatever their length, because a `Regroups` objective makes
            examples of `max_length` of them.
        score_prompts: the prompt of a preferred reply is supervised too, with weight 0.
    """

    format: DataFormat
    max_length: int
    train_on: Literal["assistant", "all", "none"] = "assistant"
    labels: tuple[str, ...] | None = None
    chat_template: str | None = None
    whole: bool = False
    score_prompts: bool = False

    @property
    def limit(self) -> int | None:
        """Tokens after which a row is cut off."""
        return None if self.whole else self.max_length


@runtime_checkable
class Prepares(Protocol):
    """A `TaskRuntime` whose inputs are not, or not only, text."""

    def load_tokenizer(self, path: Path) -> PreTrainedTokenizerBase:
        """What stands for the tokenizer, from the base model's folder; called before all else.

        Raises:
            tunery.errors.BaseModelUnavailable: the folder does not say how inputs are prepared.
        """
        ...


def examples_of(encoded: Example | Sequence[Example]) -> Sequence[Example]:
    """What `TaskRuntime.encode` made of one row, one or several."""
    return (encoded,) if isinstance(encoded, Example) else encoded


class TaskRuntime(Protocol):
    """The half of a task that needs torch."""

    smooths_labels: bool
    """Whether `supervised_loss` heeds `MethodRun.label_smoothing`."""
    peft_task_type: str | None
    """PEFT's `TaskType` value, for instance CAUSAL_LM or SEQ_CLS; None where PEFT has none."""
    layouts: frozenset[Layout]
    """Batch layouts that its models can read."""

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The base model on the CPU, in eval mode, from a local folder and safetensors only.

        `options` go to `from_pretrained`, for instance `attn_implementation`.

        Raises:
            tunery.errors.BaseModelUnavailable: the folder does not hold such a model.
        """
        ...

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example | Sequence[Example]:
        """A canonical row (`tunery.data.formats`, transforms applied) as tokens.

        A row that is too long for one example may become several, all with its `index`.

        Raises:
            tunery.errors.InvalidData: cannot be encoded; names the row, never quotes it.
        """
        ...

    def collate(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        """A micro-batch, on the CPU."""
        ...

    def units(self, example: Example) -> float:
        """Denominator units of `supervised_loss`."""
        ...

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """The task's own maximum-likelihood loss, summed over units."""
        ...

    def outcomes(
        self, model: nn.Module, batch: Batch, out: LossOutput, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """What is kept of each example of an evaluated batch, by name; first axis E.

        Usually `out.outcomes`. A task may ask the model again here, for instance to generate, where
        one of the metrics' `names` needs it.
        """
        ...

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """The named evaluation metrics, as far as what was seen allows."""
        ...

    def export_files(self) -> Mapping[str, Any]:
        """What other libraries want to find beside the weights: JSON documents by relative path."""
        ...

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """A row per example, plain JSON: `row`, its number in the file, and what was answered."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """What an adapter's `apply` is given.

    Attributes:
        model: the base model, on the CPU or its device, nothing frozen yet.
        task_type: PEFT's `TaskType` value.
        seed: initialisation must depend on nothing else.
        base_model_name: goes into `adapter_config.json` as `base_model_name_or_path`.
    """

    model: PreTrainedModel
    task_type: str | None
    tokenizer: PreTrainedTokenizerBase
    seed: int
    base_model_name: str
    revision: str | None = None


class ComputesTokenLosses(Protocol):
    """What the model says about the supervised tokens, by body and head."""

    def __call__(
        self, model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0
    ) -> TokenLosses:
        """Losses in `Batch.target_ids`' order."""
        ...

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(S, V) with graph: of each token at each supervised position, where all are needed."""
        ...


@dataclass(frozen=True, slots=True)
class FurtherModel:
    """A base model beside the one that trains: on the device, in eval mode, frozen."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class MethodRun:
    """What a method's `objective` is given.

    Attributes:
        task: whose loss and models are used.
        token_losses: model and batch to `TokenLosses`; runs body and head, computes no logits
            where there is no label, and picks the head's path by memory. Use it, not the model.
        reference: context in which the model answers as it did before training (a PEFT adapter is
            switched off). None for full fine-tuning: `Objective.prepare` has to look before.
        seed: for methods that draw.
        losses_of: `token_losses` of another causal language model.
        tokenizer: of the model that trains.
        further_model: loads one of those that the method said it needs, by name. Raises
            `BaseModelUnavailable`.
        label_smoothing: share of each target that `TaskRuntime.supervised_loss` spreads evenly over
            all classes, in training. Above 0 only where the task `smooths_labels`.
    """

    task: TaskRuntime
    token_losses: ComputesTokenLosses
    reference: Callable[[], AbstractContextManager[Any]] | None
    seed: int
    losses_of: Callable[[Any], ComputesTokenLosses] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    further_model: Callable[[str], FurtherModel] | None = None
    label_smoothing: float = 0.0
