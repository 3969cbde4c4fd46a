"""Speech to text: what is said in a sound, by models with an encoder and a decoder: Whisper.

Radford et al.: Robust Speech Recognition via Large-Scale Weak Supervision, 2022, arXiv
2212.04356.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Task
from tunery.evaluation.speech import character_error_rate, plain, word_error_rate
from tunery.tasks._decoding import Decoding
from tunery.tasks._headed import load_headed
from tunery.tasks._media import audio
from tunery.tasks._perceiving import PREPROCESSOR, load_preparer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import Batch, EncodeOptions, Evaluated, Example, Layout, TaskRuntime

RATES = ("wer", "cer", "normalized_wer")
_INPUT = "input_features"


class SpeechToTextConfig(EntryConfig):
    max_target_length: int = Field(
        225, ge=2, le=440, description="Tokens that a transcription, given or generated, may have."
    )
    num_beams: int = Field(
        1, ge=1, le=64, description="Beams of the search that evaluations generate with."
    )


class SpeechToText:
    name: ClassVar[str] = "speech-to-text"
    title: ClassVar[str] = "Speech to text"
    summary: ClassVar[str] = "What is said in a sound, by Whisper and models like it."
    paper: ClassVar[str | None] = (
        "Radford et al.: Robust Speech Recognition via Large-Scale Weak Supervision, 2022, "
        "arXiv 2212.04356"
    )
    Config: ClassVar[type[EntryConfig]] = SpeechToTextConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "speech-to-text", "max_target_length": 64}
    formats: ClassVar[frozenset[str]] = frozenset({"transcription"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", *RATES)
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "token_accuracy", "wer", "cer")
    example_row: ClassVar[Mapping[str, Any]] = {
        # Four samples of silence: a WAV file in base64.
        "audio": "UklGRiwAAABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YQgAAAAAAAAAAAAAAA==",
        "text": "The shop opens at ten.",
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime(config or SpeechToTextConfig())


class Runtime(Decoding):
    """A spectrogram and what was said in, losses of the text's tokens out."""

    # PEFT's class for encoder-decoder models insists on token ids as the encoder's input.
    peft_task_type: str | None = None

    def __init__(self, config: SpeechToTextConfig) -> None:
        super().__init__(max_new_tokens=config.max_target_length, num_beams=config.num_beams)
        self._max_target_length = config.max_target_length
        self._preparer: Any = None
        self._dtype: torch.dtype | None = None

    def load_tokenizer(self, path: Path) -> PreTrainedTokenizerBase:
        """The tokenizer; reads how sounds are prepared, too.

        Raises:
            BaseModelUnavailable: the folder lacks one of them.
        """
        from transformers import AutoFeatureExtractor

        from tunery.training.program import load_tokenizer

        self._preparer = load_preparer(AutoFeatureExtractor, path, "audio")
        return load_tokenizer(path)

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The speech model in `path`.

        Raises:
            BaseModelUnavailable: the folder does not hold one.
        """
        from transformers import AutoModelForSpeechSeq2Seq

        model = load_headed(
            AutoModelForSpeechSeq2Seq, path, what="speech to text", dtype=dtype, **options
        )
        self._dtype = dtype
        places = getattr(model.config, "max_target_positions", None)
        if places is not None:
            # Generation begins with up to four tokens: start, language, task, no timestamps.
            self._max_new_tokens = min(self._max_new_tokens, places - 5)
            self._max_target_length = min(self._max_target_length, places)
        return self.starts_with(model)

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        """The sound as the model hears it, and the text as the tokenizer frames it.

        Raises:
            InvalidData: the sound cannot be decoded, or the text has no tokens.
        """
        import numpy as np

        from tunery.training.types import IGNORE, Document, Example

        rate = int(self._preparer.sampling_rate)
        longest = float(getattr(self._preparer, "chunk_length", 30))
        samples_T = audio(row["audio"], rate, longest, index)
        found = self._preparer(samples_T, sampling_rate=rate, return_tensors="np")
        ids = tokenizer(
            text_target=row["text"], truncation=True, max_length=self._max_target_length
        )["input_ids"]
        # Whisper's tokenizer writes the start that the model is given anyway.
        said = ids[1:] if ids and ids[0] == self._start else ids
        features = np.asarray(found[_INPUT][0], dtype=np.float32)
        # Blank tokens say what the encoder costs: it halves the frames.
        positions = max(1, features.shape[-1] // 2)
        blank = np.zeros(positions, dtype=np.int32)
        source = Document(blank, np.full(positions, IGNORE, dtype=np.int32))
        target = self.target_document(said, tokenizer, index)
        return Example((source, target), None, index, {_INPUT: features})

    def sources(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        """The spectrograms; nothing is padded, for all have one length."""
        from tunery.training.collate import collate

        batch = collate(examples, layout=layout, pad_id=pad_id, inputs=(_INPUT,))
        batch.extras[_INPUT] = batch.extras[_INPUT].to(self._dtype)
        batch.feeds_tokens = False
        return batch

    def needs_text(self, names: Sequence[str]) -> bool:
        return not set(names).isdisjoint(RATES)

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per token; error rates as shares, of words, characters, and of words in
        lower case without punctuation."""
        values = super().metrics(names, seen)
        if seen.outcomes and self.needs_text(names):
            pairs = [self.texts(outcome, seen) for outcome in seen.outcomes]
            truths, said = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            rates = {
                "wer": word_error_rate(truths, said),
                "cer": character_error_rate(truths, said),
                "normalized_wer": word_error_rate(list(map(plain, truths)), list(map(plain, said))),
            }
            values |= {name: rates[name] for name in names if name in rates}
        return values

    def export_files(self) -> Mapping[str, Any]:
        """How sounds are prepared."""
        return {PREPROCESSOR: self._preparer.to_dict()} if self._preparer else {}


ENTRY: type[Task] = SpeechToText
