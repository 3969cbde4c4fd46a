"""What the tasks share whose model sees or hears: an array per row in, a class out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.errors import BaseModelUnavailable
from tunery.tasks._headed import Headed
from tunery.tasks._sequences import label_id
from tunery.tasks.text_classification import class_loss, class_metrics, class_predictions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import nn

    from tunery.training.types import (
        Batch,
        EncodeOptions,
        Evaluated,
        Example,
        Layout,
        LossOutput,
        MethodRun,
    )

PREPROCESSOR = "preprocessor_config.json"


class NoTokenizer:
    """Stands where a tokenizer does for models that read no text: it has no tokens at all."""

    chat_template = bos_token = eos_token = None
    bos_token_id = eos_token_id = pad_token_id = None
    is_fast = True

    def __init__(self) -> None:
        self.special_tokens_map: dict[str, str] = {}
        self.all_special_ids: list[int] = []
        self.added_tokens_decoder: dict[int, Any] = {}

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save; the task's own files say how inputs are prepared."""

    def decode(self, ids: Any, **_: Any) -> str:
        return ""


def load_preparer(auto: Any, path: Path, what: str) -> Any:
    """transformers' feature extractor or image processor, from the base model's folder.

    Raises:
        BaseModelUnavailable: there is none.
    """
    try:
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelUnavailable(
            f"the base model's folder does not say how {what} is prepared ({type(error).__name__})",
            hint=f"import it again, with its {PREPROCESSOR}",
        ) from error


class Perceiving(Headed):
    """Rows with a label: `prepared` makes the model's array of one, and counts its positions."""

    peft_task_type: str | None = None
    smooths_labels: bool = True
    column: str
    """Of the sound or picture."""

    def __init__(self) -> None:
        self._preparer: Any = None
        self._input = ""

    def prepared(self, data: bytes, index: int) -> tuple[np.ndarray, int]:
        """The model's input, of one shape over the file, and the positions it takes."""
        raise NotImplementedError

    def encode(
        self, row: Mapping[str, Any], tokenizer: Any, options: EncodeOptions, index: int
    ) -> Example:
        """The model's input as an array, beside a document of as many blank tokens as it costs.

        Raises:
            InvalidData: it cannot be decoded, or the label is not among the known ones.
        """
        import numpy as np

        from tunery.training.types import IGNORE, Document, Example

        array, positions = self.prepared(row[self.column], index)
        blank = np.zeros(positions, dtype=np.int32)
        document = Document(blank, np.full(positions, IGNORE, dtype=np.int32))
        target = label_id(row["label"], options.labels or (), index)
        return Example((document,), target, index, {self._input: array})

    def collate(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        from tunery.training.collate import collate

        batch = collate(examples, layout=layout, pad_id=pad_id, inputs=(self._input,))
        batch.feeds_tokens = False
        return batch

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum of the examples' cross entropies, in nats, and accuracy."""
        dtype = next(model.parameters()).dtype
        inputs = {name: value.to(dtype) for name, value in batch.inputs().items()}
        return class_loss(model(**inputs).logits.float(), batch, run, training=model.training)

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per example; accuracy and the F1 means in 0..1."""
        return class_metrics(names, seen)

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The likeliest label, the true one, and the probability of each."""
        return class_predictions(seen)

    def export_files(self) -> Mapping[str, Any]:
        """How inputs are prepared."""
        return {PREPROCESSOR: self._preparer.to_dict()} if self._preparer else {}
