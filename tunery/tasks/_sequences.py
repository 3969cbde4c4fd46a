"""What the tasks share that answer once for a whole text, or for a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.errors import InvalidData
from tunery.tasks._headed import Headed, load_headed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import Batch, Document

TYPES = "token_type_ids"


class Sequences(Headed):
    """Texts, or pairs of them, in; scores of a sequence classification model out."""

    peft_task_type: str | None = "SEQ_CLS"

    def __init__(self) -> None:
        self._scoring: dict[int, nn.Module | None] = {}
        self._takes_types = True

    def load(self, path: Path, **options: Any) -> PreTrainedModel:
        """See `load_headed`."""
        import inspect

        from transformers import AutoModelForSequenceClassification

        model = load_headed(
            AutoModelForSequenceClassification, path, what="classification", **options
        )
        self._takes_types = TYPES in inspect.signature(model.forward).parameters
        return model

    def document(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        index: int,
    ) -> Document:
        """`text`, with `text_pair` after it if there is one, as the tokenizer frames them.

        A text is cut at the right; of a pair, the longer one is.

        Raises:
            InvalidData: there are no tokens.
        """
        import numpy as np

        from tunery.training.types import IGNORE, Document

        pair = row.get("text_pair")
        encoded = tokenizer(row["text"], pair, truncation=True, max_length=max_length)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        if not len(ids):
            raise InvalidData(f"row {index}: the text has no tokens", code="empty_text")
        paired = pair is not None and TYPES in encoded
        tracks = {TYPES: np.asarray(encoded[TYPES], dtype=np.int32)} if paired else {}
        return Document(ids, np.full(len(ids), IGNORE, dtype=np.int32), tracks=tracks)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores, float32 (E, C).

        A decoder's score is read at each text's last real token by position. transformers looks for
        the last token that is not the pad token, which is another one where pad is also the stop
        token and the text ends with it.
        """
        inputs = batch.inputs()
        if not self._takes_types:
            inputs.pop(TYPES, None)
        head = self._scoring_head(model)
        if head is None:
            return model(**inputs).logits.float()  # type: ignore[no-any-return]
        caught: list[Tensor] = []
        handle = head.register_forward_hook(lambda _, __, scores_BTC: caught.append(scores_BTC))
        try:
            model(**inputs, use_cache=False)
        finally:
            handle.remove()
        return _at_last_token(caught[0], batch).float()

    def _scoring_head(self, model: nn.Module) -> nn.Module | None:
        """A decoder's `score`, which runs at every position; None for encoders."""
        if id(model) not in self._scoring:
            named = dict(model.named_modules())
            heads = [path for path in named if path.rpartition(".")[2] == "score"]
            self._scoring[id(model)] = named[min(heads, key=len)] if heads else None
        return self._scoring[id(model)]


def label_id(label: Any, labels: tuple[str, ...], index: int) -> int:
    """The label's place among the names; a number is a name too.

    Raises:
        InvalidData: it is none of them.
    """
    try:
        return labels.index(str(label))
    except ValueError:
        raise InvalidData(
            f"row {index}: its label is none of the {len(labels)} known ones",
            code="unknown_label",
        ) from None


def _at_last_token(scores_BTC: Tensor, batch: Batch) -> Tensor:
    """(E, C): prompt tuning makes rows longer in front, padding stands on the right."""
    import torch

    rows, given = batch.input_ids.shape
    in_front = scores_BTC.shape[1] - given
    if batch.attention_mask is None:
        return scores_BTC[:, -1]
    last_B = batch.attention_mask.sum(dim=1) - 1 + in_front
    return scores_BTC[torch.arange(rows, device=last_B.device), last_B]
