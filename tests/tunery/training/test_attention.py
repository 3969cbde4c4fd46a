"""The variable-length kernel's call, tried with a plain stand-in where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunery.errors import UnsupportedCombination
from tunery.training import attention

STARTS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)


def plain(
    q: Any,
    k: Any,
    v: Any,
    starts_q: Any,
    starts_k: Any,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, by a mask over all pairs."""
    assert longest_q == longest_k == int(starts_q.diff().max())
    assert q.shape[1] == k.shape[1], "this one knows no grouped heads"
    rows = torch.arange(len(q))
    owner = torch.bucketize(rows, starts_q[1:].long(), right=True)
    back = rows[:, None] - rows[None]
    left, right = window_size
    seen = (owner[:, None] == owner[None]) & (back >= -right)
    if left >= 0:
        seen &= back <= left
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * factor
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scaling", [None, 0.5, 8**-0.5])
def test_the_kernel_is_called_for_what_the_loop_over_documents_gives(
    monkeypatch: pytest.MonkeyPatch, window: int | None, scaling: float | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 13, 8)
    key, value = torch.randn(2, 1, 2, 13, 8)
    expected = attention._by_document(query, key, value, STARTS, 0.0, scaling, window)
    monkeypatch.setattr(attention, "_varlen", lambda: (plain, False))
    found = attention._kernel(query, key, value, STARTS, 7, scaling, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_kernel_without_a_needed_argument_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(q: Any, k: Any, v: Any, a: Any, b: Any, c: int, d: int) -> torch.Tensor:
        raise AssertionError("called without its window")

    monkeypatch.setattr(attention, "_varlen", lambda: (old, False))
    states = torch.randn(3, 1, 2, 13, 8)
    with pytest.raises(UnsupportedCombination, match="window_size"):
        attention._kernel(*states, STARTS, 7, None, None)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_scores_that_are_changed_on_the_way_are_refused(name: str) -> None:
    states = torch.randn(3, 1, 2, 13, 8)
    with pytest.raises(UnsupportedCombination):
        attention.packed_attention(
            torch.nn.Identity(), *states, None, cu_seq_lens_q=STARTS, **{name: 1.0}
        )


def test_the_installed_kernel_takes_what_it_is_given() -> None:
    import inspect

    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    assert "window_size" in inspect.signature(varlen).parameters
