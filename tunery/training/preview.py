"""Rows as the model will see them, token by token, the trained ones marked."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from tunery import catalogue
from tunery.data.read import read_rows
from tunery.errors import InvalidData
from tunery.training.preflight import Preflight, inspect, special_ids
from tunery.training.program import tokenizer_for
from tunery.training.types import IGNORE, EncodeOptions, examples_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from tunery.spec import DataFile, TrainingSpec, Use
    from tunery.training.types import Document, Example, TaskRuntime

MAX_PROBLEMS = 100
_PARTIAL = "\N{REPLACEMENT CHARACTER}"


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Token(_Plain):
    id: int
    text: str = Field(
        description="What it adds to the text; empty where a character needs further tokens."
    )
    trained: bool
    special: bool


class PreviewDocument(_Plain):
    """One sequence; a preference row has two, the preferred reply first."""

    tokens: tuple[Token, ...]
    trained_tokens: int

    def segments(self) -> list[tuple[str, bool]]:
        """Runs of text with whether they are trained."""
        return [
            ("".join(token.text for token in run), trained)
            for trained, run in groupby(self.tokens, key=lambda token: token.trained)
        ]


class PreviewRow(_Plain):
    row: int = Field(description="Number in its file, from 0.")
    documents: tuple[PreviewDocument, ...]
    label: str | None = None


class Problem(_Plain):
    row: int
    code: str
    message: str


class Preview(_Plain):
    """Some rows in full, and what all that were looked at amount to."""

    rows: tuple[PreviewRow, ...]
    preflight: Preflight
    problems: tuple[Problem, ...] = Field(
        (), description="Rows that cannot be encoded; the first hundred."
    )

    def check(self) -> None:
        """Let good data pass.

        Raises:
            InvalidData: a row cannot be encoded, or nothing would be learnt.
        """
        if self.problems:
            first = self.problems[0]
            raise InvalidData(
                first.message,
                code=first.code,
                param="training_file",
                problems=[problem.model_dump() for problem in self.problems],
            )
        self.preflight.check()


def preview(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskRuntime,
    options: EncodeOptions,
    *,
    transforms: Sequence[Use] = (),
    show: int = 3,
) -> Preview:
    """Encode canonical rows as a run would, and look at them.

    Args:
        rows: the sample to look at; all of it is held in memory.
        options: the format is that of the rows after the transforms.
        transforms: applied first; may set the tokenizer's chat template.
        show: rows given token by token.

    Raises:
        InvalidData: a transform cannot do its work.
    """
    ready = transformed(list(rows), transforms, tokenizer)
    examples, problems = _encoded(ready, tokenizer, task, options)
    return Preview(
        rows=tuple(_row(example, tokenizer, options) for example in examples[:show]),
        preflight=inspect(examples, tokenizer, options),
        problems=tuple(problems[:MAX_PROBLEMS]),
    )


def sampled(
    spec: TrainingSpec, file: DataFile, path: Path, base: Path, *, sample: int, show: int = 3
) -> Preview:
    """The first rows of a file as a run of `spec` on the base model in `base` would encode them.

    Args:
        sample: rows to look at.

    Raises:
        BaseModelUnavailable: the base has no tokenizer.
        InvalidData: a transform cannot do its work.
    """
    format: Any = file.format
    for use in spec.transforms:
        transform = catalogue.find("transforms", use.type)
        format = transform.produces(transform.Config.model_validate(use.config), format)
    task = catalogue.find("tasks", spec.task.type)
    method = catalogue.find("methods", spec.method.type)
    config: Any = method.Config.model_validate(spec.method.config)
    options = EncodeOptions(
        format=format,
        max_length=config.row_length,
        train_on=getattr(config, "train_on", "assistant"),
        labels=file.labels,
    )
    lines = islice(read_rows(path, file.suffix, file.format), sample)
    runtime = task.runtime(task.Config.model_validate(spec.task.config))
    return preview(
        (row for _, row in lines),
        tokenizer_for(runtime, base),
        runtime,
        options,
        transforms=spec.transforms,
        show=show,
    )


def transformed(
    rows: list[dict[str, Any]], transforms: Sequence[Use], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The rows after each of the transforms in turn.

    Raises:
        InvalidConfig: there is no such transform.
        InvalidData: a row does not fit one.
    """
    for use in transforms:
        entry = catalogue.find("transforms", use.type)
        rows = entry.apply(entry.Config.model_validate(use.config), rows, tokenizer)
    return rows


def _encoded(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskRuntime,
    options: EncodeOptions,
) -> tuple[list[Example], list[Problem]]:
    examples: list[Example] = []
    problems = []
    for index, row in enumerate(rows):
        try:
            examples += examples_of(task.encode(row, tokenizer, options, index))
        except InvalidData as error:
            problems.append(Problem(row=index, code=error.code, message=error.message))
    return examples, problems


def _row(
    example: Example, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> PreviewRow:
    return PreviewRow(
        row=example.index,
        documents=tuple(_document(document, tokenizer) for document in example.documents),
        label=options.labels[example.target]
        if options.labels and isinstance(example.target, int)
        else None,
    )


def _document(document: Document, tokenizer: PreTrainedTokenizerBase) -> PreviewDocument:
    special = special_ids(tokenizer)
    ids = document.input_ids.tolist()
    trained = ((document.labels if document.tags is None else document.tags) != IGNORE).tolist()
    if document.tags is None:
        trained[:1] = [False] * len(trained[:1])  # There is nothing to predict it from.
    return PreviewDocument(
        tokens=tuple(
            Token(id=token, text=text, trained=learnt, special=token in special)
            for token, text, learnt in zip(ids, _texts(ids, tokenizer), trained, strict=True)
        ),
        trained_tokens=document.supervised,
    )


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds. Decoded from the last whole character on, since decoders look back."""
    texts = []
    start = done = 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        if text.endswith(_PARTIAL) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[done:])
        # Keep one token as context: some decoders drop the space before a text's first token.
        start = end - 1
        done = len(str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)))
    return texts


def rendered(document: PreviewDocument) -> Text:
    """For a terminal: trained tokens on green, special ones dim, line breaks visible."""
    from rich.text import Text

    out = Text()
    for token in document.tokens:
        shown = token.text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
        style = "black on green" if token.trained else "dim" if token.special else ""
        out.append(shown, style=style)
    return out
