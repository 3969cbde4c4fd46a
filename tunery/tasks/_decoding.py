"""What the tasks share whose model has a decoder of its own, fed with what was said so far.

The target is the example's last document: a place for the decoder's start token, then the tokens
to be said. Read by the rule of all documents, every token but the start is predicted from those
before it. The start token is the model's, and put in when a batch is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tunery.tasks.text_generation as generation
from tunery.errors import BaseModelUnavailable, InvalidData
from tunery.evaluation.generation import ROUGE, bleu, chrf, exact_match, rouge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import (
        Batch,
        Document,
        Evaluated,
        Example,
        Layout,
        LossOutput,
        Outcome,
    )

TEXT_METRICS = (*ROUGE, "bleu", "chrf", "exact_match")


class Decoding(generation.Runtime):
    """Sources in, losses of the target's tokens out; answers by generation in evaluations."""

    peft_task_type: str | None = "SEQ_2_SEQ_LM"
    layouts: frozenset[Layout] = frozenset({"rows"})

    def __init__(self, *, max_new_tokens: int, num_beams: int) -> None:
        self._max_new_tokens, self._num_beams = max_new_tokens, num_beams
        self._start = 0

    def starts_with(self, model: PreTrainedModel) -> PreTrainedModel:
        """Remember the model's start token; the model again.

        Raises:
            BaseModelUnavailable: its config names none.
        """
        start = model.config.decoder_start_token_id
        if start is None:
            raise BaseModelUnavailable("the base model's config has no decoder_start_token_id")
        self._start = int(start)
        model.train(False)
        return model

    def target_document(
        self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, index: int
    ) -> Document:
        """The place of the start token, then the tokens to be said.

        Raises:
            InvalidData: there are none.
        """
        import numpy as np

        from tunery.training.types import IGNORE, Document

        if not len(ids):
            raise InvalidData(f"row {index}: the target has no tokens", code="empty_text")
        # Nothing is said at the start's place; the stop token there is what looks least odd.
        start = tokenizer.eos_token_id or 0
        labels = np.array([IGNORE, *ids], dtype=np.int32)
        return Document(np.array([start, *ids], dtype=np.int32), labels)

    def collate(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        """The encoder's part of the batch, and beside it the decoder's tokens."""
        from dataclasses import replace

        from tunery.training.collate import collate

        said = collate(
            [replace(e, documents=e.documents[-1:], arrays={}) for e in examples],
            layout=layout,
            pad_id=pad_id,
        )
        said.input_ids[:, 0] = self._start
        read = self.sources(examples, layout=layout, pad_id=pad_id)
        return replace(
            said,
            input_ids=read.input_ids,
            attention_mask=read.attention_mask,
            max_seqlen=max(read.max_seqlen, said.max_seqlen),
            tokens=sum(example.tokens for example in examples),
            extras={**read.extras, "decoder_input_ids": said.input_ids},
            lengths=None,
            feeds_tokens=read.feeds_tokens,
        )

    def sources(self, examples: Sequence[Example], *, layout: Layout, pad_id: int) -> Batch:
        """What the encoder reads, padded, with its mask."""
        from dataclasses import replace

        from tunery.training.collate import collate

        return collate(
            [replace(example, documents=example.documents[:-1]) for example in examples],
            layout=layout,
            pad_id=pad_id,
            mask=True,
        )

    def needs_text(self, names: Sequence[str]) -> bool:
        """Whether one of the metrics is about generated text."""
        return not set(names).isdisjoint(TEXT_METRICS)

    def outcomes(
        self, model: nn.Module, batch: Batch, out: LossOutput, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """What the model says by itself, int64 (E, L), where a metric needs it."""
        if not self.needs_text(names):
            return {}
        inputs = batch.inputs()
        inputs.pop("decoder_input_ids")
        bare: Any = getattr(model, "module", model)  # DDP and DeepSpeed wrap what can generate
        divided = any(hasattr(parameter, "ds_id") for parameter in bare.parameters())
        said = bare.generate(
            **inputs,
            max_new_tokens=self._max_new_tokens,
            num_beams=self._num_beams,
            do_sample=False,
            use_cache=True,
            synced_gpus=divided,
        )
        return {"said": said}

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """`loss` in nats per token; bleu and chrf in 0..100, the other scores in 0..1."""
        values = super().metrics(names, seen)
        if not seen.outcomes:
            return values
        truths, said = zip(*(self.texts(outcome, seen) for outcome in seen.outcomes), strict=True)
        rouges = [name for name in ROUGE if name in names]
        if rouges:
            values |= rouge(truths, said, rouges)
        for name, score in (("bleu", bleu), ("chrf", chrf), ("exact_match", exact_match)):
            if name in names:
                values[name] = score(truths, said)
        return values

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The generated text and the true one."""
        for outcome in seen.outcomes:
            truth, said = self.texts(outcome, seen)
            yield {"row": outcome.example.row, "prediction": said, "label": truth}

    def texts(self, outcome: Outcome, seen: Evaluated) -> tuple[str, str]:
        """The true text, as its tokens spell it, and the generated one."""
        assert seen.tokenizer is not None
        true = outcome.example.documents[-1].input_ids[1:]
        return (
            str(seen.tokenizer.decode(true.tolist(), skip_special_tokens=True)),
            str(seen.tokenizer.decode(outcome.values["said"].tolist(), skip_special_tokens=True)),
        )
