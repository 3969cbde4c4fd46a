"""What the first step would learn from, looked at before it: wrong templates and masks are silent.

Works on encoded examples, so it sees what the loop sees: of a whole file at the start of a run, of
a sample in a dry run or a preview. Messages carry counts and row numbers, never text.
"""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tunery.errors import InvalidData
from tunery.training.encoding import template_sha256
from tunery.training.types import IGNORE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

    from tunery.training.types import Document, EncodeOptions, Example

SHOWN_ROWS = 8
"""Row numbers that a finding names."""
TRUNCATED_SHARE = 0.1
"""Share of cut rows from which on a warning is due."""
_HAS_PROMPT = frozenset({"chat", "prompt_completion"})


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Finding(_Plain):
    """Something about the data that whoever sent it should know."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    hint: str | None = None
    rows: int = Field(0, description="How many rows it is about.")
    first_rows: tuple[int, ...] = Field((), description="Row numbers of the first of them.")


class Shares(_Plain):
    """Over rows: trained tokens divided by all tokens, 0..1."""

    min: float
    median: float
    max: float


class Bucket(_Plain):
    """Rows longer than the bucket before and at most this long."""

    up_to: int = Field(description="Tokens.")
    rows: int


class Preflight(_Plain):
    """Plain JSON: shown by a dry run, by `tunery data preview` and in a run's first event."""

    rows: int
    tokens: int
    trained_tokens: int
    trained_share: Shares | None = Field(description="None for classification.")
    longest: int = Field(description="Tokens of the longest document.")
    median_length: float
    histogram: tuple[Bucket, ...]
    truncated_rows: int
    stop_tokens: dict[str, int] = Field(
        description="The last trained token of each complete document, counted; at most five kinds."
    )
    bos_token: str | None
    pad_is_eos: bool = Field(
        description="Harmless here: padding is told apart by position, never by id."
    )
    template_sha256: str | None
    labels: dict[str, int] | None = Field(None, description="Classification: rows per label.")
    findings: tuple[Finding, ...]

    @property
    def refusal(self) -> Finding | None:
        """Why the file cannot be trained on; None when it can."""
        return next((f for f in self.findings if f.severity == "error"), None)

    def check(self) -> None:
        """Let a good file pass.

        Raises:
            InvalidData: nothing would be learnt.
        """
        refusal = self.refusal
        if refusal is not None:
            raise InvalidData(
                refusal.message, code=refusal.code, hint=refusal.hint, param="training_file"
            )


def inspect(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    *,
    pad_id: int | None = None,
) -> Preflight:
    """Look at encoded examples, one pass, memory of a few numbers per row.

    Args:
        options: that they were encoded with.
        pad_id: what micro-batches are padded with; None for the tokenizer's own.
    """
    survey = _Survey(tokenizer, options, pad_id)
    for example in examples:
        survey.add(example)
    return survey.result()


def _speaks(example: Example) -> bool:
    """Whether tokens are learnt, beside a target or without one."""
    return example.target is None or any(document.supervised for document in example.documents)


class _Rows:
    """Row numbers of one kind."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, index: int) -> None:
        self.count += 1
        if len(self.first) < SHOWN_ROWS:
            self.first.append(index)


class _Survey:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions, pad_id: int | None
    ) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if pad_id is None else pad_id
        self.adds_bos = self.bos is not None and _starts_with(tokenizer("a")["input_ids"], self.bos)
        self.specials = special_ids(tokenizer)
        self.lengths: list[int] = []
        self.shares: list[float] = []
        self.tokens = self.trained = 0
        self.stops: Counter[int] = Counter()
        self.classes: Counter[int] = Counter()
        self.by_kind: dict[str, _Rows] = {}

    def add(self, example: Example) -> None:
        self.lengths.append(example.longest)
        self.tokens += example.tokens
        if isinstance(example.target, int):
            self.classes[example.target] += 1
        if _speaks(example):
            self._add_tokens(example)
        for kind in self._kinds(example):
            self.by_kind.setdefault(kind, _Rows()).add(example.index)

    def _add_tokens(self, example: Example) -> None:
        trained = sum(document.supervised for document in example.documents)
        self.trained += trained
        # A document's first token can never be predicted.
        tagged = any(document.tags is not None for document in example.documents)
        possible = example.tokens - (0 if tagged else len(example.documents))
        self.shares.append(trained / possible if possible else 0.0)
        if self.options.whole:
            return
        for document in example.documents:
            if document.supervised and document.tags is None and not self._cut(document):
                self.stops[_last_trained(document)] += 1

    def _kinds(self, example: Example) -> Iterator[str]:
        """What there is to say about a row, by finding."""
        # Blank documents stand for sounds and pictures: there are no tokens to look at.
        documents = tuple(d for d in example.documents if d.input_ids.any())
        if self.options.whole:
            return  # Blocks of the rows' text begin and end wherever they do.
        if any(self._cut(document) for document in documents):
            yield "rows_truncated"
        if any(self.bos is not None and _twice(d.input_ids, self.bos) for d in documents):
            yield "bos_twice"
        if self.adds_bos and not all(_starts_with(d.input_ids, self.bos) for d in documents):
            yield "bos_missing"
        if self.pad != self.eos and any((d.input_ids == self.pad).any() for d in documents):
            yield "pad_token_in_text"
        if _speaks(example) and self.options.train_on != "none":
            yield from self._kinds_of_trained(documents)

    def _kinds_of_trained(self, documents: tuple[Document, ...]) -> Iterator[str]:
        if not any(document.supervised for document in documents):
            yield "rows_without_trained_tokens"
        elif len(documents) == 2 and not all(document.weighted for document in documents):
            yield "pairs_without_a_reply"
        if len(documents) == 2 and np.array_equal(documents[0].input_ids, documents[1].input_ids):
            yield "equal_replies"
        predicted = [d for d in documents if d.supervised and d.tags is None]
        ends = [_last_trained(d) for d in predicted if not self._cut(d)]
        if any(end not in self.specials for end in ends):
            yield "stop_token_not_trained"

    def _cut(self, document: Document) -> bool:
        """Reaches the limit, and not by ending there: its last token ends no turn."""
        full = len(document.input_ids) >= self.options.max_length
        return full and int(document.input_ids[-1]) not in self.specials

    def result(self) -> Preflight:
        shares = self.shares
        names = self.options.labels or ()
        return Preflight(
            rows=len(self.lengths),
            tokens=self.tokens,
            trained_tokens=self.trained,
            trained_share=Shares(min=min(shares), median=median(shares), max=max(shares))
            if shares
            else None,
            longest=max(self.lengths, default=0),
            median_length=median(self.lengths) if self.lengths else 0.0,
            histogram=_histogram(self.lengths),
            truncated_rows=self._count("rows_truncated"),
            stop_tokens={
                str(self.tokenizer.convert_ids_to_tokens(token)): count
                for token, count in self.stops.most_common(5)
            },
            bos_token=self.tokenizer.bos_token if self.adds_bos else None,
            pad_is_eos=self.pad is not None and self.pad == self.eos,
            template_sha256=template_sha256(self.tokenizer),
            labels={name: self.classes[i] for i, name in enumerate(names)}
            if self.classes
            else None,
            findings=tuple(self._findings()),
        )

    def _count(self, kind: str) -> int:
        return self.by_kind[kind].count if kind in self.by_kind else 0

    def _findings(self) -> Iterator[Finding]:
        rows = len(self.lengths)
        yield from self._refusals(rows)
        for kind, (message, hint) in _WARNINGS.items():
            found = self.by_kind.get(kind)
            if found is None or (kind == "rows_truncated" and found.count < TRUNCATED_SHARE * rows):
                continue
            yield _warning(kind, message.format(n=found.count, rows=rows), hint, found)
        yield from self._whole_file()

    def _refusals(self, rows: int) -> Iterator[Finding]:
        if not rows:
            yield _refusal("the file has no rows", "no_trainable_tokens", None)
        elif self.shares and not self.trained and self.options.train_on != "none":
            yield _refusal(
                f"none of the {self.tokens} tokens in {rows} rows would be trained",
                "no_trainable_tokens",
                "rows need a reply of the assistant (with weight 1, if weights are given) within "
                f"the first {self.options.max_length} tokens: raise max_length, or set train_on",
            )
        elif self._count("equal_replies") == rows:
            yield _refusal(
                f"in all {rows} rows both replies are the same: there is nothing to prefer",
                "no_trainable_tokens",
                None,
            )
        elif len(self.classes) == 1:
            yield _refusal(
                f"all {rows} rows have the same label",
                "no_trainable_tokens",
                "give examples of two labels or more",
            )

    def _whole_file(self) -> Iterator[Finding]:
        """Warnings that are about no single row."""
        with_prompt = self.options.format in _HAS_PROMPT and self.options.train_on == "assistant"
        if with_prompt and self.shares and min(self.shares) == 1.0:
            yield _warning(
                "prompts_are_trained",
                "every token of every row would be trained, prompts included",
                "give rows a prompt, or say train_on 'all' if that is meant",
            )
        strange = {token for token in self.stops if token in self.specials} - {self.eos}
        if self.options.format == "chat" and strange and self.eos not in self.stops:
            name = self.tokenizer.convert_ids_to_tokens(min(strange))
            yield _warning(
                "stop_token_is_not_eos",
                f"replies end with {name}, the tokenizer's stop token is "
                f"{self.tokenizer.eos_token}",
                "serve the result with this token as a stop token, or choose the base's own "
                "chat template",
            )
        missing = [i for i in range(len(self.options.labels or ())) if not self.classes[i]]
        if missing and self.classes:
            yield _warning(
                "labels_without_rows", f"{len(missing)} labels have no row to learn from", None
            )


_WARNINGS: dict[str, tuple[str, str | None]] = {
    "rows_without_trained_tokens": (
        "{n} of {rows} rows have no trained token: no reply, or one that max_length cuts off",
        "remove them, or raise max_length",
    ),
    "rows_truncated": ("{n} of {rows} rows are longer than max_length and cut", "raise max_length"),
    "stop_token_not_trained": (
        "{n} of {rows} rows do not train a stop token: the result may not know when to stop",
        "choose a chat template that ends the assistant's turns with one",
    ),
    "bos_twice": (
        "{n} of {rows} rows begin with two BOS tokens",
        "leave the BOS token out of the text: the tokenizer adds it",
    ),
    "bos_missing": (
        "{n} of {rows} rows lack the BOS token that the tokenizer puts in front",
        "choose a chat template that begins with it",
    ),
    "pad_token_in_text": (
        "{n} of {rows} rows contain the pad token",
        "leave the pad token out of the text",
    ),
    "pairs_without_a_reply": (
        "{n} of {rows} pairs lack a reply, which max_length cuts off: they do not count",
        "raise max_length",
    ),
    "equal_replies": ("{n} of {rows} rows have two equal replies", "remove them"),
}
"""Findings about rows: message and hint."""


def _warning(code: str, message: str, hint: str | None, found: _Rows | None = None) -> Finding:
    return Finding(
        code=code,
        severity="warning",
        message=message,
        hint=hint,
        rows=found.count if found else 0,
        first_rows=tuple(found.first) if found else (),
    )


def _refusal(message: str, code: str, hint: str | None) -> Finding:
    return Finding(code=code, severity="error", message=message, hint=hint)


def _histogram(lengths: list[int]) -> tuple[Bucket, ...]:
    """Rows by length, in powers of two from 16 on; empty buckets in between are kept."""
    if not lengths:
        return ()
    tops = [16]
    while tops[-1] < max(lengths):
        tops.append(tops[-1] * 2)
    counts = Counter(next(top for top in tops if length <= top) for length in lengths)
    first = tops.index(min(counts))
    return tuple(Bucket(up_to=top, rows=counts[top]) for top in tops[first:])


def _last_trained(document: Document) -> int:
    place = int(np.flatnonzero(document.labels != IGNORE)[-1])
    return int(document.labels[place])


def _starts_with(ids: Any, token: int | None) -> bool:
    return len(ids) > 0 and int(ids[0]) == token


def _twice(ids: np.ndarray, token: int) -> bool:
    return len(ids) > 1 and int(ids[0]) == int(ids[1]) == token


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that are no text: those with a role, and those marked so among the added ones."""
    added = tokenizer.added_tokens_decoder
    return frozenset(
        [*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)]
    )
