"""Audio classification: one label per sound, by audio encoders: AST, Wav2Vec2, HuBERT, WavLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import EntryConfig, Task
from tunery.tasks._headed import load_headed, need_two
from tunery.tasks._media import audio
from tunery.tasks._perceiving import NoTokenizer, Perceiving, load_preparer
from tunery.tasks.text_classification import SCORERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from tunery.training.types import TaskRuntime

_SAMPLES_A_POSITION = 320
"""Of the convolutions in front of Wav2Vec2 and its kin."""


class AudioClassificationConfig(EntryConfig):
    max_seconds: float = Field(
        10.0, gt=0, le=600, description="Of each sound; what is over is cut off, what lacks silent."
    )


class AudioClassification:
    name: ClassVar[str] = "audio-classification"
    title: ClassVar[str] = "Audio classification"
    summary: ClassVar[str] = "One label per sound, from a closed set."
    paper: ClassVar[str | None] = (
        "Gong et al.: AST: Audio Spectrogram Transformer, 2021, arXiv 2104.01778"
    )
    Config: ClassVar[type[EntryConfig]] = AudioClassificationConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "audio-classification", "max_seconds": 10}
    formats: ClassVar[frozenset[str]] = frozenset({"audio_classification"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", *SCORERS)
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1")
    example_row: ClassVar[Mapping[str, Any]] = {
        # Four samples of silence: a WAV file in base64.
        "audio": "UklGRiwAAABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YQgAAAAAAAAAAAAAAA==",
        "label": "silence",
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime(config or AudioClassificationConfig())


class Runtime(Perceiving):
    """A spectrogram or a waveform and its class id in, cross entropy over the classes out."""

    column = "audio"

    def __init__(self, config: AudioClassificationConfig) -> None:
        super().__init__()
        self._max_seconds = config.max_seconds

    def load_tokenizer(self, path: Path) -> Any:
        """None; reads how sounds are prepared.

        Raises:
            BaseModelUnavailable: the folder does not say.
        """
        from transformers import AutoFeatureExtractor

        self._preparer = load_preparer(AutoFeatureExtractor, path, "audio")
        self._input = self._preparer.model_input_names[0]
        return NoTokenizer()

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` with a classification head; label names go into its config.

        Raises:
            BaseModelUnavailable: the folder does not hold a model that can classify sounds.
            InvalidConfig: fewer than two labels.
        """
        from transformers import AutoModelForAudioClassification

        return load_headed(
            AutoModelForAudioClassification,
            path,
            what="audio classification",
            labels=need_two(labels, "audio-classification"),
            dtype=dtype,
            **options,
        )

    def prepared(self, data: bytes, index: int) -> tuple[np.ndarray, int]:
        """A spectrogram, (frames, bins), or the waveform, (samples,), filled with silence."""
        import numpy as np

        rate = int(self._preparer.sampling_rate)
        samples_T = audio(data, rate, self._max_seconds, index)
        found = self._preparer(samples_T, sampling_rate=rate, return_tensors="np")
        array = np.asarray(found[self._input][0], dtype=np.float32)
        if array.ndim > 1:
            return array, len(array)
        whole = np.zeros(int(self._max_seconds * rate), dtype=np.float32)
        whole[: len(array)] = array
        return whole, max(1, len(whole) // _SAMPLES_A_POSITION)


ENTRY: type[Task] = AudioClassification
