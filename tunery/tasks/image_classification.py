"""Image classification: one label per picture, by vision encoders: ViT, DeiT, DINOv2, Swin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunery.entries import EntryConfig, Task
from tunery.tasks._headed import load_headed, need_two
from tunery.tasks._media import image
from tunery.tasks._perceiving import NoTokenizer, Perceiving, load_preparer
from tunery.tasks.text_classification import SCORERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from tunery.training.types import TaskRuntime

_PATCH = 16
"""Pixels of a patch's side where the model does not say."""


class ImageClassificationConfig(EntryConfig):
    """Nothing to set: size and colours are the base model's, the labels the data's."""


class ImageClassification:
    name: ClassVar[str] = "image-classification"
    title: ClassVar[str] = "Image classification"
    summary: ClassVar[str] = "One label per picture, from a closed set."
    paper: ClassVar[str | None] = (
        "Dosovitskiy et al.: An Image is Worth 16x16 Words, 2020, arXiv 2010.11929"
    )
    Config: ClassVar[type[EntryConfig]] = ImageClassificationConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "image-classification"}
    formats: ClassVar[frozenset[str]] = frozenset({"image_classification"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", *SCORERS)
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1")
    example_row: ClassVar[Mapping[str, Any]] = {
        # One black pixel: a PNG file in base64.
        "image": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAA"
        "AACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==",
        "label": "night",
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime()


class Runtime(Perceiving):
    """Pixel values and their class id in, cross entropy over the classes out."""

    column = "image"

    def __init__(self) -> None:
        super().__init__()
        self._patch = _PATCH

    def load_tokenizer(self, path: Path) -> Any:
        """None; reads how pictures are prepared.

        Raises:
            BaseModelUnavailable: the folder does not say.
        """
        from transformers import AutoImageProcessor

        self._preparer = load_preparer(AutoImageProcessor, path, "an image")
        self._input = "pixel_values"
        return NoTokenizer()

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` with a classification head; label names go into its config.

        Raises:
            BaseModelUnavailable: the folder does not hold a model that can classify pictures.
            InvalidConfig: fewer than two labels.
        """
        from transformers import AutoModelForImageClassification

        model = load_headed(
            AutoModelForImageClassification,
            path,
            what="image classification",
            labels=need_two(labels, "image-classification"),
            dtype=dtype,
            **options,
        )
        patch = getattr(model.config, "patch_size", None)
        self._patch = patch if isinstance(patch, int) else _PATCH
        return model

    def prepared(self, data: bytes, index: int) -> tuple[np.ndarray, int]:
        """(channels, height, width), in the base model's size and scale of colours."""
        import numpy as np

        found = self._preparer(image(data, index), return_tensors="np")
        array = np.asarray(found[self._input][0], dtype=np.float32)
        patches = (array.shape[-1] // self._patch) * (array.shape[-2] // self._patch)
        return array, patches + 1


ENTRY: type[Task] = ImageClassification
