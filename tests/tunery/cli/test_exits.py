from __future__ import annotations

import pytest

from tunery import errors
from tunery.cli.exits import Exit, code_of
from tunery.client import WaitTimeout


def test_the_numbers_never_change() -> None:
    assert {code.name: int(code) for code in Exit} == {
        "OK": 0,
        "BUG": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "NOT_FOUND": 4,
        "NOT_PERMITTED": 5,
        "CONFLICT": 6,
        "UNAVAILABLE": 7,
        "FAILED": 10,
        "CANCELLED": 11,
        "TIMED_OUT": 12,
    }


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (errors.InvalidConfig, 3),
        (errors.InvalidData, 3),
        (errors.UnsupportedCombination, 3),
        (errors.NotFound, 4),
        (errors.BaseModelUnavailable, 4),
        (errors.Unauthenticated, 5),
        (errors.PermissionDenied, 5),
        (errors.QuotaExceeded, 5),
        (errors.Conflict, 6),
        (errors.ServiceUnavailable, 7),
        (errors.CheckpointCorrupt, 1),
        (WaitTimeout, 12),
    ],
)
def test_an_error_ends_with_its_code(cls: type[errors.AppError], code: int) -> None:
    assert code_of(cls("x")) == code
