"""Token classification: a tag for each word, such as the names in a text.

A word may be several tokens. Its tag is learnt at, and read off, the first of them. What is too
long for the model goes on in another window, so that every word is tagged.
"""

from __future__ import annotations

from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Task
from tunery.errors import InvalidData
from tunery.evaluation.classification import accuracy
from tunery.evaluation.entities import OUTSIDE, found
from tunery.tasks._headed import Headed, load_headed, need_two

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


class TokenClassificationConfig(EntryConfig):
    label_all_tokens: bool = Field(
        False,
        description="Learn a word's tag at all of its tokens, not at the first alone. A B- tag "
        "goes on as the I- tag of its type.",
    )


class TokenClassification:
    name: ClassVar[str] = "token-classification"
    title: ClassVar[str] = "Token classification"
    summary: ClassVar[str] = "A tag for each word of a text: names, parts of speech."
    paper: ClassVar[str | None] = None
    Config: ClassVar[type[EntryConfig]] = TokenClassificationConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "token-classification"}
    formats: ClassVar[frozenset[str]] = frozenset({"token_classification"})
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "entity_f1",
        "entity_precision",
        "entity_recall",
        "accuracy",
    )
    default_metrics: ClassVar[tuple[str, ...]] = metrics
    example_row: ClassVar[Mapping[str, Any]] = {
        "tokens": ["Ada", "Lovelace", "lived", "in", "London", "."],
        "tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "O"],
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime(config or TokenClassificationConfig())


class Runtime(Headed):
    """Documents with tags in, cross entropy over the tagged tokens out."""

    peft_task_type: str | None = "TOKEN_CLS"

    def __init__(self, config: TokenClassificationConfig) -> None:
        self._config = config

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` with a tagging head; label names go into its config.

        Raises:
            BaseModelUnavailable: the folder does not hold a model that can tag.
            InvalidConfig: fewer than two labels.
        """
        from transformers import AutoModelForTokenClassification

        labels = need_two(labels, "token-classification")
        return load_headed(
            AutoModelForTokenClassification,
            path,
            what="token classification",
            labels=labels,
            dtype=dtype,
            **options,
        )

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Sequence[Example]:
        """The words, joined by blanks, as the tokenizer frames them: a window or more.

        Each example's array `words`, int32 (W, 2), has place of the first token and true tag of the
        words that begin in its window; a word that the tokenizer drops has place -1.

        Raises:
            InvalidData: no fast tokenizer, no token, or a tag is not among the known ones.
        """
        import numpy as np

        from tunery.training.types import IGNORE, TAGS, Document, Example

        tags = [_tag_id(tag, options.labels or (), index) for tag in row["tags"]]
        windows = _windows(row["tokens"], tokenizer, options.max_length, index)
        places = _first_places(windows, len(tags))
        examples = []
        for number, (ids, words) in enumerate(windows):
            learnt = np.full(len(ids), IGNORE, dtype=np.int32)
            if self._config.label_all_tokens:
                inside = [_inside(tag, options.labels or ()) for tag in tags]
                learnt[:] = [IGNORE if word is None else inside[word] for word in words]
            mine = [
                (place, tag) for (at, place), tag in zip(places, tags, strict=True) if at == number
            ]
            for place, tag in mine:
                if place >= 0:
                    learnt[place] = tag
            document = Document(
                np.asarray(ids, dtype=np.int32),
                np.full(len(ids), IGNORE, dtype=np.int32),
                tracks={TAGS: learnt},
            )
            held = {"words": np.array(mine, dtype=np.int32).reshape(-1, 2)}
            examples.append(Example((document,), None, index, held))
        return examples

    def units(self, example: Example) -> float:
        """Tagged tokens."""
        return float(example.documents[0].supervised)

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum of the tagged tokens' cross entropies, in nats, and their accuracy."""
        from torch.nn import functional

        from tunery.training.types import IGNORE, LossOutput

        assert batch.tags is not None
        # A soft prompt's positions stand in front of the text's own.
        logits_BTC = model(**batch.inputs()).logits[:, -batch.width :].float()
        loss = functional.cross_entropy(
            logits_BTC.flatten(0, 1), batch.tags.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        said_BT = logits_BTC.detach().argmax(dim=2)
        tagged_BT = batch.tags != IGNORE
        correct = ((said_BT == batch.tags) & tagged_BT).sum().float()
        return LossOutput(
            loss=loss,
            sums={"token_accuracy": (correct, tagged_BT.sum().float())},
            outcomes={} if model.training else {"tags": said_BT},
        )

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per tagged token; shares of entities, and of words, in 0..1."""
        values = {"loss": seen.loss}
        truths, predictions = [], []
        for _, truth, prediction in _sentences(seen):
            truths.append(truth)
            predictions.append(prediction)
        if truths:
            counted = found(truths, predictions)
            values |= {
                "entity_f1": counted.f1,
                "entity_precision": counted.precision,
                "entity_recall": counted.recall,
                "accuracy": accuracy(list(chain(*truths)), list(chain(*predictions))),
            }
        return {name: values[name] for name in names if name in values}

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The tags of each sentence's words, and the true ones."""
        for row, truth, prediction in _sentences(seen):
            yield {"row": row, "prediction": prediction, "label": truth}


def _sentences(seen: Evaluated) -> Iterator[tuple[int, list[str], list[str]]]:
    """Row, true tags and predicted tags of each sentence, its windows put together."""
    default = OUTSIDE if OUTSIDE in seen.labels else seen.labels[0] if seen.labels else OUTSIDE
    for row, outcomes in groupby(seen.outcomes, key=lambda outcome: outcome.example.row):
        truth, prediction = [], []
        for outcome in outcomes:
            for place, tag in outcome.example.arrays["words"].tolist():
                truth.append(seen.labels[tag])
                said = outcome.values["tags"][place] if place >= 0 else None
                prediction.append(default if said is None else seen.labels[int(said)])
        yield row, truth, prediction


def _windows(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, index: int
) -> list[tuple[list[int], list[int | None]]]:
    """Token ids, and for each token the word that it is part of; None for the frame's."""
    if not tokenizer.is_fast:
        raise InvalidData(
            "the base model's tokenizer has no fast version, which telling words apart needs",
            code="tokenizer_error",
        )
    encoded = tokenizer(
        " ".join(words),
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owner: list[int | None] = []  # of each character; blanks between words are nobody's
    for number, word in enumerate(words):
        owner += [*([None] if number else []), *([number] * len(word))]
    windows = [
        (ids, [_owner(owner, *span) for span in offsets])
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    if not any(word is not None for _, owners in windows for word in owners):
        raise InvalidData(f"row {index}: the text has no tokens", code="empty_text")
    return windows


def _owner(owner: Sequence[int | None], start: int, end: int) -> int | None:
    return next((word for word in owner[start:end] if word is not None), None)


def _first_places(
    windows: Sequence[tuple[list[int], list[int | None]]], words: int
) -> list[tuple[int, int]]:
    """Window and place of each word's first token; a word without one stays with its neighbour."""
    first: dict[int, tuple[int, int]] = {}
    for number, (_, owners) in enumerate(windows):
        for place, word in enumerate(owners):
            if word is not None and word not in first:
                first[word] = (number, place)
    places: list[tuple[int, int]] = []
    for word in range(words):
        at = places[-1][0] if places else 0
        places.append(first.get(word, (at, -1)))
    return places


def _tag_id(tag: str, labels: tuple[str, ...], index: int) -> int:
    try:
        return labels.index(tag)
    except ValueError:
        raise InvalidData(
            f"row {index}: a tag is none of the {len(labels)} known ones", code="unknown_label"
        ) from None


def _inside(tag: int, labels: tuple[str, ...]) -> int:
    """The tag of a word's further tokens."""
    name = labels[tag]
    going_on = "I" + name[1:]
    return labels.index(going_on) if name.startswith("B-") and going_on in labels else tag


ENTRY: type[Task] = TokenClassification
