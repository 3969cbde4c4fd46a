"""From a batch to the losses of its supervised tokens, with no work where nothing is learnt.

The head is the dearest matrix of a small model and chat data supervises a third to a half of its
tokens, so the hidden states of the others are dropped before the head. That is done by a hook on
the head itself: the model's own forward runs, with whatever it does around its head (caps, scales,
prompt-tuning tokens in front, a DDP or DeepSpeed wrapper outside), only on fewer rows.

Two heads give the same numbers. Plain: all logits of the supervised rows at once, by far the faster
where they fit. Chunked: a few rows at a time, with the gradient of the hidden states formed during
the forward pass, so that neither the logits nor a second pass over the head is ever needed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from tunery.errors import UnsupportedCombination
from tunery.training.attention import borders
from tunery.training.types import TokenLosses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from tunery.training.types import Batch

_RESCALERS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""What models do to logits after the head; the chunked head would not know."""


@dataclass(frozen=True, slots=True)
class HeadPolicy:
    """How the head is run.

    Attributes:
        compact: drop unsupervised positions first.
        path: which head; "auto" takes plain while the logits stay below `max_logits_bytes`.
        max_logits_bytes: of one micro-batch, in float32.
        chunk_rows: rows of the chunked head's tiles.
    """

    compact: bool = True
    path: Literal["auto", "plain", "chunked"] = "auto"
    max_logits_bytes: int = 2 << 30
    chunk_rows: int = 1024


class TokenLossComputer:
    """`token_losses(model, batch)` for one base model.

    Args:
        base: the transformers model inside whatever wraps it; its output embeddings are the head.
    """

    def __init__(self, base: Any, policy: HeadPolicy | None = None) -> None:
        self.policy = policy or HeadPolicy()
        self._found: nn.Module | None = base.get_output_embeddings()
        # A model that sees or hears has no vocabulary.
        self._vocabulary = int(getattr(base.config.get_text_config(), "vocab_size", 0))
        self._chunkable = _can_chunk(self._found, base.config)
        self.used: set[str] = set()
        """Heads that have been run: plain, chunked."""

    @property
    def _head(self) -> nn.Module:
        if self._found is None:
            raise UnsupportedCombination("this model has no head that predicts tokens")
        return self._found

    def __call__(
        self, model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0
    ) -> TokenLosses:
        """Losses of the batch's supervised tokens, in `Batch.target_ids`' order.

        Args:
            label_smoothing: share of each target that is spread evenly over the vocabulary.
        """
        if self._chunked(batch):
            return self._by_chunks(model, batch, label_smoothing)
        return token_losses(self.logits(model, batch), batch.target_ids, label_smoothing)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(S, V): what the model gives every token at the supervised positions, with graph."""
        self.used.add("plain")
        with self._gather(batch) if self.policy.compact else _nothing():
            logits = self._forward(model, batch)
        rows = logits.reshape(-1, logits.shape[-1])
        if not self.policy.compact:
            rows = rows[_flat_positions(batch, logits.shape[1])]
        return rows

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch.inputs(), **borders(batch), use_cache=False).logits  # type: ignore[no-any-return]

    def _chunked(self, batch: Batch) -> bool:
        if self._chunkable and hasattr(self._head.weight, "ds_id"):
            return False  # ZeRO-3: the weight is whole only while the head's own forward runs.
        if self.policy.path != "auto":
            return self.policy.path == "chunked" and self._chunkable
        needed = batch.supervised * self._vocabulary * 4
        return self._chunkable and needed > self.policy.max_logits_bytes

    def _by_chunks(self, model: nn.Module, batch: Batch, label_smoothing: float) -> TokenLosses:
        self.used.add("chunked")
        caught: list[Tensor] = []

        def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            caught.append(_compacted(inputs[0], batch)[0])
            return (inputs[0][:, :0],)

        handle = self._head.register_forward_pre_hook(catch)
        try:
            self._forward(model, batch)
        finally:
            handle.remove()
        nll, correct = _ChunkedHead.apply(
            caught[0],
            self._head.weight,
            self._head.bias,
            batch.target_ids,
            self.policy.chunk_rows,
            label_smoothing,
        )  # type: ignore[no-untyped-call]
        return TokenLosses(nll=nll, correct=correct)

    @contextmanager
    def _gather(self, batch: Batch) -> Iterator[None]:
        handle = self._head.register_forward_pre_hook(
            lambda _, inputs: (_compacted(inputs[0], batch), *inputs[1:])
        )
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def token_losses(
    logits_SV: Tensor, target_ids: Tensor, label_smoothing: float = 0.0
) -> TokenLosses:
    """Losses from logits whose row s predicts `target_ids[s]`."""
    logits_SV = logits_SV.float()
    nll = functional.cross_entropy(
        logits_SV, target_ids, reduction="none", label_smoothing=label_smoothing
    )
    with torch.no_grad():
        said = logits_SV.gather(1, target_ids[:, None]).squeeze(1)
        correct = (said >= logits_SV.amax(dim=1)).float() if len(said) else said
    return TokenLosses(nll=nll, correct=correct)


def _compacted(hidden_BTH: Tensor, batch: Batch) -> Tensor:
    """(1, S, H): the rows that predict something."""
    flat = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
    return flat.index_select(0, _flat_positions(batch, hidden_BTH.shape[1]))[None]


def _flat_positions(batch: Batch, width: int) -> Tensor:
    """`target_positions` in rows of `width`, which prompt tuning makes longer in front."""
    given = batch.width
    if width == given:
        return batch.target_positions
    row = torch.div(batch.target_positions, given, rounding_mode="floor")
    return batch.target_positions + (row + 1) * (width - given)


def _can_chunk(head: nn.Module | None, config: Any) -> bool:
    """A frozen, plain linear head with nothing behind it."""
    if type(head) is not torch.nn.Linear or any(p.requires_grad for p in head.parameters()):
        return False
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in _RESCALERS)


class _ChunkedHead(torch.autograd.Function):
    """Frozen head and cross entropy in tiles of rows.

    Every loss has gradient (softmax - target) @ W with respect to its own row, scaled by what flows
    back into it; the target is one token, or (1 - e) of it and e / V of every token. So that
    product is formed while the tile's logits are at hand, and the backward pass is one
    multiplication: 4 V H operations per token, as with a plain head that is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_ids: Tensor,
        chunk_rows: int,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden_SH.shape[0]
        nll = hidden_SH.new_empty(rows, dtype=torch.float32)
        correct = hidden_SH.new_empty(rows, dtype=torch.float32)
        keep = ctx.needs_input_grad[0]
        slope_SH = torch.empty_like(hidden_SH) if keep else hidden_SH.new_empty(0)
        for start in range(0, rows, chunk_rows):
            span = slice(start, start + chunk_rows)
            logits = functional.linear(hidden_SH[span], weight_VH, bias_V).float()
            targets = target_ids[span, None]
            said = logits.gather(1, targets).squeeze(1)
            norm = logits.logsumexp(dim=1)
            nll[span] = norm - said
            if label_smoothing:
                nll[span].lerp_(norm - logits.mean(dim=1), label_smoothing)
            correct[span] = (said >= logits.amax(dim=1)).float()
            if keep:
                softmax = logits.sub_(norm[:, None]).exp_()
                share = softmax.new_full(targets.shape, label_smoothing - 1.0)
                softmax.scatter_add_(1, targets, share)
                if label_smoothing:
                    softmax.sub_(label_smoothing / softmax.shape[1])
                slope_SH[span] = softmax.to(weight_VH.dtype) @ weight_VH
        ctx.save_for_backward(slope_SH)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slope_SH,) = ctx.saved_tensors
        return slope_SH * grad_nll[:, None].to(slope_SH.dtype), *[None] * 5
