from __future__ import annotations

import pytest

from api.pagination import limit_of, order_of, page
from tunery.errors import InvalidConfig


def test_limits_are_clamped_and_defaulted() -> None:
    asked = [None, "0", "-3", "1", "7", "100", "101"]
    assert [limit_of(raw, default=20, most=100) for raw in asked] == [20, 1, 1, 1, 7, 100, 100]


@pytest.mark.parametrize("raw", ["", "ten", "1.5", "1e3", "٣x"])
def test_a_limit_that_is_no_integer_is_refused(raw: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        limit_of(raw, default=20, most=100)
    assert refused.value.param == "limit"


def test_orders_in_both_spellings() -> None:
    asked = [None, "asc", "desc", "ascending", "descending"]
    assert [order_of(raw) for raw in asked] == ["desc", "asc", "desc", "asc", "desc"]
    with pytest.raises(InvalidConfig):
        order_of("up")


def test_a_page_says_whether_more_follows_and_where() -> None:
    assert page([{"id": "b"}, {"id": "a"}], more=True) == {
        "object": "list",
        "data": [{"id": "b"}, {"id": "a"}],
        "has_more": True,
        "first_id": "b",
        "last_id": "a",
    }
    empty = page([], more=False)
    assert (empty["data"], empty["has_more"], empty["last_id"]) == ([], False, None)
