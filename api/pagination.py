"""Cursor pages as the stock clients walk them: `after` is the last item's id, `has_more` decides.

A page is read with one row more than asked; that row's presence is `has_more`, so it is never
missing and never wrong. Cursors name rows, not offsets: inserts while somebody pages shift nothing.
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


def page(items: Sequence[Mapping[str, Any]], *, more: bool) -> dict[str, Any]:
    """The list envelope."""
    return {
        "object": "list",
        "data": list(items),
        "has_more": more,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
    }
