"""Whether documents may share a row, asked of the model itself.

Architectures keep state across positions in more ways than attention (convolutions, recurrences,
chunked windows), and a leak shows in no error and in no loss curve. So nobody's list is trusted:
before the first step two documents are run alone and together, and have to say the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunery.errors import AppError
from tunery.training.attention import register
from tunery.training.collate import collate
from tunery.training.tuners import _prefixed
from tunery.training.types import Document, Example

if TYPE_CHECKING:
    from torch import nn

    from tunery.training.losses import TokenLossComputer

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 3e-2}
_LENGTHS = (9, 14, 5)


def switch_on(base: Any) -> bool:
    """Give the model our attention; False where its class, or its adapter, does not take one."""
    if not getattr(base, "_supports_attention_backend", False):
        return False
    if base.config._attn_implementation.startswith(_prefixed.NAME):
        return False
    base.set_attn_implementation(register())
    return True


def switch_off(base: Any, attention: str) -> None:
    """Back to the attention it had."""
    base.set_attn_implementation(attention)


@torch.no_grad()
def isolates(model: nn.Module, losses: TokenLossComputer, vocabulary: int) -> bool:
    """Whether packed documents get the losses that they get alone, to rounding."""
    parameter = next(model.parameters())
    draw = np.random.default_rng(0)
    examples = [_random(draw, length, vocabulary) for length in _LENGTHS]
    was_training = model.training
    model.eval()
    try:
        packed = collate(examples, layout="packed", pad_id=0).to(parameter.device)
        together = losses(model, packed).nll
        alone = [
            losses(model, collate([one], layout="rows", pad_id=0).to(parameter.device)).nll
            for one in examples
        ]
    except (AppError, RuntimeError, TypeError, ValueError, IndexError):
        return False  # The model cannot read a packed row at all.
    finally:
        model.train(was_training)
    tolerance = _TOLERANCE.get(parameter.dtype, 1e-4)
    return bool(torch.allclose(together, torch.cat(alone), rtol=tolerance, atol=tolerance))


def _random(draw: np.random.Generator, length: int, vocabulary: int) -> Example:
    ids = draw.integers(0, vocabulary, length).astype(np.int32)
    return Example(documents=(Document(ids, ids),), target=None, index=0)
