"""Attention for packed rows: each document sees itself and nothing else.

Registered with transformers as `tunery_packed`. Document borders come as the keyword arguments that
flash attention uses (`cu_seq_lens_q`), so every model that passes its keyword arguments on to its
attention can be packed. On CUDA in half precision this is torch's own variable-length kernel;
elsewhere a loop over the documents, each through `scaled_dot_product_attention`, which cannot leak
because no call ever sees two documents.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from tunery.errors import UnsupportedCombination

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunery.training.types import Batch

NAME = "tunery_packed"


@cache
def register() -> str:
    """Make the attention known to transformers; returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def borders(batch: Batch) -> dict[str, Any]:
    """What a packed batch's forward pass is told beside its inputs.

    The mask is a placeholder: transformers takes four axes for a finished mask and hands it on,
    where it would otherwise look for restarting positions (a device read) and build T x T masks.
    """
    if batch.cu_seqlens is None:
        return {}
    return {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.cu_seqlens.device),
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Rows of documents need transformers' own masks, packed rows none."""
    from transformers.masking_utils import sdpa_mask

    if kwargs.get("attention_mask") is None and kwargs.get("local_size") is None:
        return None
    return sdpa_mask(*args, **kwargs)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (B, heads, T, d), key and value (B, kv heads, T, d).

    Returns (B, T, heads, d), and no weights.

    Raises:
        UnsupportedCombination: the model asks for capped scores or attention sinks.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedCombination(f"packed attention has no {name}", code="packing")
    starts = kwargs.get("cu_seq_lens_q")
    window = kwargs.get("sliding_window")
    if starts is None:
        out = _dense(query, key, value, attention_mask, dropout, scaling)
    elif _has_kernel(query, dropout):
        out = _kernel(query, key, value, starts, kwargs["max_length_q"], scaling, window)
    else:
        out = _by_document(query, key, value, starts, dropout, scaling, window)
    return out.transpose(1, 2).contiguous(), None


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    parts = []
    for start, end in pairwise(starts.tolist()):
        mask = _band(end - start, window, query.device)
        span = slice(start, end)
        parts.append(
            _dense(query[:, :, span], key[:, :, span], value[:, :, span], mask, dropout, scaling)
        )
    return torch.cat(parts, dim=2)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool (length, length), True where query row may see key column; None: plain causal."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


@cache
def _varlen() -> tuple[Any, bool] | None:
    """torch's kernel and whether it takes fewer key heads than query heads (torch >= 2.12)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _has_kernel(query: Tensor, dropout: float) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and dropout == 0 and _varlen() is not None


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    found = _varlen()
    assert found is not None
    varlen_attn, gqa = found
    given: dict[str, Any] = {"window_size": ((window or 0) - 1, 0)}
    if scaling is not None and not math.isclose(scaling, query.shape[-1] ** -0.5):
        given["scale"] = scaling
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if q.shape[1] != k.shape[1]:
        if gqa:
            given["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # Tuples of (T, heads, d); torch 2.11 spells causal as a window without a right side too.
    out = varlen_attn(q, k, v, starts, starts, longest, longest, **_known(varlen_attn, given))
    return out.transpose(0, 1)[None]  # type: ignore[no-any-return]


def _known(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    missing = [name for name in given if name not in names]
    if missing:
        raise UnsupportedCombination(
            f"this torch's varlen_attn has no {', '.join(missing)}", code="packing"
        )
    return given
