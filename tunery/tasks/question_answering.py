"""Question answering: the part of a context that answers a question, or that there is none.

A context that is too long is read in windows that overlap. In a window without the answer the first
token, [CLS], is the answer; over all windows the best span wins.

    Devlin et al.: BERT, 2018, arXiv 1810.04805, section 4.2 and 4.3.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Task
from tunery.errors import InvalidData
from tunery.evaluation.answers import exact_match, f1
from tunery.tasks._headed import Headed, load_headed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
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

_TYPES = "token_type_ids"


class QuestionAnsweringConfig(EntryConfig):
    stride: int = Field(128, ge=0, description="Tokens that a window has in common with the next.")
    max_answer_length: int = Field(30, ge=1, description="Tokens that an answer may have.")
    n_best: int = Field(20, ge=1, description="Starts and ends of a window that are combined.")
    null_threshold: float = Field(
        0.0,
        description="How far the score of 'no answer' must be above the best answer's to be said. "
        "Only where the evaluated file has questions without an answer.",
    )


class QuestionAnswering:
    name: ClassVar[str] = "question-answering"
    title: ClassVar[str] = "Question answering"
    summary: ClassVar[str] = "The part of a text that answers a question, or that there is none."
    paper: ClassVar[str | None] = (
        "Rajpurkar et al.: SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016, "
        "arXiv 1606.05250"
    )
    Config: ClassVar[type[EntryConfig]] = QuestionAnsweringConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "question-answering", "stride": 128}
    formats: ClassVar[frozenset[str]] = frozenset({"question_answering"})
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "exact_match",
        "f1",
        "has_answer_exact_match",
        "has_answer_f1",
        "no_answer_accuracy",
    )
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "exact_match", "f1")
    example_row: ClassVar[Mapping[str, Any]] = {
        "question": "Where did Ada Lovelace live?",
        "context": "Ada Lovelace lived in London and wrote on the analytical engine.",
        "answers": [{"text": "London", "answer_start": 22}],
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime(config or QuestionAnsweringConfig())


class Runtime(Headed):
    """A question and a window of its context in, cross entropies of start and end out."""

    peft_task_type: str | None = "QUESTION_ANS"

    def __init__(self, config: QuestionAnsweringConfig) -> None:
        self._config = config
        self._takes_types = True

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` with a head for start and end.

        Raises:
            BaseModelUnavailable: the folder does not hold a model that can.
        """
        import inspect

        from transformers import AutoModelForQuestionAnswering

        model = load_headed(
            AutoModelForQuestionAnswering,
            path,
            what="question answering",
            dtype=dtype,
            num_labels=2,  # another number, left over from another head, breaks transformers' split
            **options,
        )
        self._takes_types = _TYPES in inspect.signature(model.forward).parameters
        return model

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Sequence[Example]:
        """The windows of the row's context, each after the whole question.

        The target is int64 (2,), places of the answer's first and last token. Arrays, for putting
        an answer back into words: `context`, bytes of the window's part of it; `spans`, int32
        (T, 2), each token's characters in that part, -1 outside the context; `null`, place of the
        token that stands for no answer; `answers`, bytes of the true ones as JSON.

        Raises:
            InvalidData: no fast tokenizer, or the question leaves no room for the context.
        """
        encoded = _windows(row, tokenizer, options.max_length, self._config.stride, index)
        return [
            _window(row, encoded, number, tokenizer, index)
            for number in range(len(encoded["input_ids"]))
        ]

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum over windows of the mean of start's and end's cross entropy, in nats."""
        from torch.nn import functional

        from tunery.training.types import LossOutput

        inputs = batch.inputs()
        if not self._takes_types:
            inputs.pop(_TYPES, None)
        out = model(**inputs)
        # A soft prompt's positions stand in front of the text's own.
        start_ET = out.start_logits[:, -batch.width :].float()
        end_ET = out.end_logits[:, -batch.width :].float()
        assert batch.targets is not None
        first_E, last_E = batch.targets.unbind(1)
        loss = (
            functional.cross_entropy(start_ET, first_E, reduction="sum")
            + functional.cross_entropy(end_ET, last_E, reduction="sum")
        ) / 2
        kept = {} if model.training else {"start": start_ET, "end": end_ET}
        return LossOutput(loss=loss, outcomes=kept)

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per window; SQuAD's exact match and F1 in 0..1, over questions."""
        values = {"loss": seen.loss}
        scored = [
            (exact_match(said, true), f1(said, true), bool(true))
            for _, said, true in self._answers(seen)
        ]
        answered = [(match, overlap) for match, overlap, has in scored if has]
        unanswered = [match for match, _, has in scored if not has]
        if scored:
            values["exact_match"] = sum(match for match, _, _ in scored) / len(scored)
            values["f1"] = sum(overlap for _, overlap, _ in scored) / len(scored)
        if answered:
            values["has_answer_exact_match"] = sum(match for match, _ in answered) / len(answered)
            values["has_answer_f1"] = sum(overlap for _, overlap in answered) / len(answered)
        if unanswered:
            values["no_answer_accuracy"] = sum(unanswered) / len(unanswered)
        return {name: values[name] for name in names if name in values}

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The best answer, empty where there is none, and the true ones."""
        for row, said, true in self._answers(seen):
            yield {"row": row, "prediction": said, "label": true}

    def _answers(self, seen: Evaluated) -> Iterator[tuple[int, str, list[str]]]:
        """Row, best answer and true answers of each question, its windows taken together."""
        may_refuse = any(not _true(outcome) for outcome in seen.outcomes)
        for row, windows in groupby(seen.outcomes, key=lambda outcome: outcome.example.row):
            group = list(windows)
            score, said = max((self._best(outcome) for outcome in group), key=lambda pair: pair[0])
            null = min(_null_score(outcome) for outcome in group)
            refused = may_refuse and null - score > self._config.null_threshold
            yield row, "" if refused else said, _true(group[0])

    def _best(self, outcome: Outcome) -> tuple[float, str]:
        """Score and text of a window's best span."""
        arrays = outcome.example.arrays
        spans = arrays["spans"]
        inside = (spans[:, 0] >= 0).nonzero()[0]
        start, end = (outcome.values[side][: len(spans)] for side in ("start", "end"))
        firsts = _top(start, inside, self._config.n_best)
        lasts = _top(end, inside, self._config.n_best)
        pairs = [
            (float(start[first] + end[last]), first, last)
            for first in firsts
            for last in lasts
            if 0 <= last - first < self._config.max_answer_length
        ]
        if not pairs:
            return float("-inf"), ""
        score, first, last = max(pairs)
        context = arrays["context"].tobytes().decode()
        return score, context[int(spans[first, 0]) : int(spans[last, 1])].strip()


def _windows(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    index: int,
) -> Any:
    if not tokenizer.is_fast:
        raise InvalidData(
            "the base model's tokenizer has no fast version, which finding answers needs",
            code="tokenizer_error",
        )
    question = row["question"].strip()
    taken = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    room = max_length - taken - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise InvalidData(
            f"row {index}: the question has {taken} tokens, which leaves no room for the context "
            f"in {max_length}",
            code="too_long",
            hint="raise max_length",
        )
    return tokenizer(
        question,
        row["context"],
        truncation="only_second",
        max_length=max_length,
        stride=min(stride, room - 1),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _window(
    row: Mapping[str, Any],
    encoded: Any,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
) -> Example:
    import numpy as np

    from tunery.training.types import IGNORE, Document, Example

    ids = np.asarray(encoded["input_ids"][number], dtype=np.int32)
    inside = np.array([side == 1 for side in encoded.sequence_ids(number)])
    spans = np.where(inside[:, None], np.asarray(encoded["offset_mapping"][number]), -1)
    # A byte-level tokenizer's tokens may have no characters; they are nobody's start or end.
    spans = np.where(spans[:, :1] < spans[:, 1:], spans, -1).astype(np.int32)
    null = _place_of(tokenizer.cls_token_id, ids)
    target = _target(row["answers"], spans, null)
    begin = int(spans[spans >= 0].min(initial=len(row["context"])))
    end = int(spans.max(initial=begin))
    part = row["context"][begin:end].encode()
    tracks = {}
    if _TYPES in encoded:
        tracks[_TYPES] = np.asarray(encoded[_TYPES][number], dtype=np.int32)
    document = Document(ids, np.full(len(ids), IGNORE, dtype=np.int32), tracks=tracks)
    true = json.dumps([answer["text"] for answer in row["answers"]]).encode()
    arrays: dict[str, np.ndarray] = {
        "context": np.frombuffer(part, dtype=np.uint8),
        "spans": np.where(spans >= 0, spans - begin, -1).astype(np.int32),
        "null": np.asarray(null, dtype=np.int32),
        "answers": np.frombuffer(true, dtype=np.uint8),
    }
    return Example((document,), target, index, arrays)


def _place_of(token: int | None, ids: np.ndarray) -> int:
    """Of the first such token; 0 where there is none."""
    found = [] if token is None else (ids == token).nonzero()[0]
    return int(found[0]) if len(found) else 0


def _target(answers: Sequence[Mapping[str, Any]], spans: np.ndarray, null: int) -> np.ndarray:
    """First and last token of the first answer; `null` twice where the window lacks part of it."""
    import numpy as np

    if answers:
        start = answers[0]["answer_start"]
        end = start + len(answers[0]["text"])
        inside = ((spans[:, 0] >= 0) & (spans[:, 0] < end) & (spans[:, 1] > start)).nonzero()[0]
        whole = len(inside) and spans[inside[0], 0] <= start and spans[inside[-1], 1] >= end
        if whole:
            return np.array([inside[0], inside[-1]], dtype=np.int64)
    return np.array([null, null], dtype=np.int64)


def _top(scores: np.ndarray, among: np.ndarray, count: int) -> list[int]:
    """Places of the highest scores."""
    return [int(among[i]) for i in (-scores[among]).argsort(kind="stable")[:count]]


def _true(outcome: Outcome) -> list[str]:
    answers: list[str] = json.loads(outcome.example.arrays["answers"].tobytes())
    return answers


def _null_score(outcome: Outcome) -> float:
    null = int(outcome.example.arrays["null"])
    return float(outcome.values["start"][null] + outcome.values["end"][null])


ENTRY: type[Task] = QuestionAnswering
