"""Cursor pages as the stock clients walk them: `after` is the last item's id, `has_more` decides.

A page is read with one row more than asked; that row's presence is `has_more`. Cursors name rows,
not offsets, so inserts while somebody pages shift nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Order = Literal["asc", "desc"]


def limit_of(raw: str | None, *, default: int, most: int) -> int:
    """The page size asked for, clamped to 1..`most`.

    Raises:
        InvalidConfig: not an integer.
    """
    if raw is None:
        return default
    try:
        asked = int(raw)
    except ValueError:
        raise InvalidConfig("limit: an integer is expected", param="limit") from None
    return max(1, min(most, asked))


def order_of(raw: str | None, *, default: Order = "desc") -> Order:
    """`asc` or `desc`; the clients' long forms are understood too.

    Raises:
        InvalidConfig: something else.
    """
    known: dict[str | None, Order] = {
        None: default,
        "asc": "asc",
        "ascending": "asc",
        "desc": "desc",
        "descending": "desc",
    }
    if raw not in known:
        raise InvalidConfig("order: asc or desc is expected", param="order")
    return known[raw]


def page(items: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """The list envelope of up to `limit` of the items; the caller read `limit` + 1."""
    shown = list(items[:limit])
    return {
        "object": "list",
        "data": shown,
        "has_more": len(items) > limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }
