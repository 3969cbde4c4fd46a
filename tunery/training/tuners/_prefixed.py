"""Attention with learned keys and values in front, in any model that uses transformers' interface.

Unlike a prefix in the cache it works in encoders and under recomputed activations, and the input's
positions stay what they are.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

NAME = "tunery_prefixed_"
"""What the attention's name begins with; the one it extends follows."""
_PLACE = "_tunery_prefix"
_EXTENDED = ("sdpa", "eager")


def put(attention: nn.Module, source: Callable[[], tuple[Tensor, Tensor] | None]) -> None:
    """Have `attention` ask `source` for keys and values, each (kv heads, n, d); None: no prefix."""
    attention.__dict__[_PLACE] = source


def switch_on(model: Any) -> None:
    """Have the model's attention look for prefixes; what it did otherwise stays."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    now = str(model.config._attn_implementation)
    if now.startswith(NAME):
        return
    inner = now if now in _EXTENDED else "sdpa"
    AttentionInterface.register(NAME + inner, _prefixed(inner))
    AttentionMaskInterface.register(NAME + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    model.set_attn_implementation(NAME + inner)


def _prefixed(inner: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name, with prefixes."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = _function(inner, module)
        source = module.__dict__.get(_PLACE)
        prefix = source() if source is not None else None
        if prefix is None:
            return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        batch, columns = len(query), prefix[0].shape[1]
        causal = kwargs.pop("is_causal", None)
        causal = getattr(module, "is_causal", False) if causal is None else causal
        mask = _widened(attention_mask, query, key, columns, causal)
        if mask is not None and inner == "eager" and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(
                ~mask, torch.finfo(query.dtype).min
            )
        keys, values = (part.to(key.dtype).expand(batch, -1, -1, -1) for part in prefix)
        return function(  # type: ignore[no-any-return]
            module,
            query,
            torch.cat((keys, key), dim=2),
            torch.cat((values, value), dim=2),
            mask,
            is_causal=False,
            **kwargs,
        )

    return attention


def _function(inner: str, module: nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if inner == "eager":  # each model's file has its own
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[inner]
    return found


def _widened(
    mask: Tensor | None, query: Tensor, key: Tensor, columns: int, causal: bool
) -> Tensor | None:
    """The mask (B, 1, T, S) with `columns` more in front that everybody sees; None sees all."""
    if mask is not None:
        seen = 1 if mask.dtype == torch.bool else 0.0
        return functional.pad(mask[..., : key.shape[2]], (columns, 0), value=seen)
    rows, width = query.shape[2], key.shape[2]
    if not causal or rows == 1:
        return None
    lower = torch.ones(rows, width, dtype=torch.bool, device=query.device)
    return functional.pad(lower.tril(width - rows), (columns, 0), value=1)[None, None]
