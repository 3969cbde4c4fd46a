"""Noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914, algorithm 1).

A document of T tokens, each embedded in H numbers, gets noise drawn evenly from -a to a with
a = alpha / sqrt(T H). T is the document's own length, padding not counted, so that the noise does
not depend on what shares its micro-batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tunery.errors import UnsupportedCombination

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from tunery.training.types import Batch


@contextmanager
def noisy_embeddings(model: nn.Module, batch: Batch, alpha: float) -> Iterator[None]:
    """Within, the model embeds the batch with noise.

    Raises:
        UnsupportedCombination: the model embeds no tokens.
    """
    handle = _embeddings(model).register_forward_hook(
        lambda _, __, embedded_BTH: embedded_BTH + noise(embedded_BTH, batch, alpha)
    )
    try:
        yield
    finally:
        handle.remove()


def noise(embedded_BTH: Tensor, batch: Batch, alpha: float) -> Tensor:
    """(B, T, H), drawn from torch's default generator."""
    import torch

    drawn_BTH = torch.zeros_like(embedded_BTH).uniform_(-1, 1)
    return drawn_BTH * (alpha / (embedded_BTH.shape[2] * _lengths(embedded_BTH, batch)) ** 0.5)


def _lengths(embedded_BTH: Tensor, batch: Batch) -> Tensor | int:
    """Tokens of the document that each position belongs to: (B, T, 1), (B, 1, 1) or a number."""
    lengths_D = batch.lengths
    if lengths_D is None or embedded_BTH.shape[:2] != batch.input_ids.shape:
        return embedded_BTH.shape[1]  # a decoder's tokens, say
    if batch.cu_seqlens is not None:
        return lengths_D.repeat_interleave(lengths_D, output_size=embedded_BTH.shape[1])[
            None, :, None
        ]
    return lengths_D[:, None, None]


def _embeddings(model: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    try:
        found = base.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        found = None
    if found is None:
        raise UnsupportedCombination(
            "neftune_noise_alpha puts noise on token embeddings, and this model has none",
            hint="leave it out",
        )
    return found
