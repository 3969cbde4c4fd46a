"""Sequence to sequence: one text into another, by models with an encoder and a decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Task
from tunery.errors import BaseModelUnavailable, InvalidData
from tunery.tasks._decoding import TEXT_METRICS, Decoding

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import EncodeOptions, Example, TaskRuntime


class SequenceToSequenceConfig(EntryConfig):
    max_target_length: int = Field(
        128, ge=2, le=65536, description="Tokens that a target, or a generated text, may have."
    )
    num_beams: int = Field(
        1, ge=1, le=64, description="Beams of the search that evaluations generate with."
    )


class SequenceToSequence:
    name: ClassVar[str] = "sequence-to-sequence"
    title: ClassVar[str] = "Sequence to sequence"
    summary: ClassVar[str] = "One text into another, by an encoder and a decoder: T5, BART."
    paper: ClassVar[str | None] = (
        "Raffel et al.: Exploring the Limits of Transfer Learning with a Unified Text-to-Text "
        "Transformer, 2019, arXiv 1910.10683"
    )
    Config: ClassVar[type[EntryConfig]] = SequenceToSequenceConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "sequence-to-sequence", "max_target_length": 64}
    formats: ClassVar[frozenset[str]] = frozenset({"source_target", "prompt_completion"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", *TEXT_METRICS)
    default_metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "token_accuracy",
        "rouge_l",
        "chrf",
        "exact_match",
    )
    example_row: ClassVar[Mapping[str, Any]] = {
        "source": "translate English to German: The shop is open.",
        "target": "Der Laden ist offen.",
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime(config or SequenceToSequenceConfig())


class Runtime(Decoding):
    """Two documents, source and target, in; losses of the target's tokens out."""

    def __init__(self, config: SequenceToSequenceConfig) -> None:
        super().__init__(max_new_tokens=config.max_target_length, num_beams=config.num_beams)
        self._max_target_length = config.max_target_length

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The encoder-decoder model in `path`."""
        from transformers import AutoModelForSeq2SeqLM

        try:
            model: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
        except (OSError, ValueError) as error:
            raise BaseModelUnavailable(
                f"no encoder-decoder model could be loaded ({type(error).__name__})",
                hint="text-generation trains models without an encoder",
            ) from error
        return self.starts_with(model)

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        """Source and target as the tokenizer frames them, each cut at the right.

        Raises:
            InvalidData: one of them has no tokens.
        """
        import numpy as np

        from tunery.training.types import IGNORE, Document, Example

        given, wanted = (
            ("source", "target") if options.format == "source_target" else ("prompt", "completion")
        )
        read = tokenizer(row[given], truncation=True, max_length=options.max_length)["input_ids"]
        said = tokenizer(
            text_target=row[wanted], truncation=True, max_length=self._max_target_length
        )["input_ids"]
        if not len(read):
            raise InvalidData(f"row {index}: the {given} has no tokens", code="empty_text")
        source = Document(
            np.asarray(read, dtype=np.int32), np.full(len(read), IGNORE, dtype=np.int32)
        )
        return Example((source, self.target_document(said, tokenizer, index)), None, index)


ENTRY: type[Task] = SequenceToSequence
