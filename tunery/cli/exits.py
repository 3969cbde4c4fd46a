"""Exit codes: part of the contract, listed in docs/cli.md, never renumbered."""

from __future__ import annotations

from enum import IntEnum

from tunery import errors
from tunery.client.wire import WaitTimeout


class Exit(IntEnum):
    """What a command's end means to a script."""

    OK = 0
    BUG = 1  #: our fault
    USAGE = 2  #: the command line is wrong
    REFUSED = 3  #: validation refused the input
    NOT_FOUND = 4
    NOT_PERMITTED = 5  #: no key, a bad one, one that may not, or a quota
    CONFLICT = 6  #: the thing's state forbids it
    UNAVAILABLE = 7  #: try again later
    FAILED = 10  #: watch, wait, train: the job failed
    CANCELLED = 11  #: watch, wait, train: the job was cancelled
    TIMED_OUT = 12  #: watch, wait: the job goes on, we do not


# The nearest class of an error's ancestry decides.
TABLE: dict[type[errors.AppError], Exit] = {
    errors.AppError: Exit.BUG,
    errors.UserError: Exit.REFUSED,
    errors.NotFound: Exit.NOT_FOUND,
    errors.Gone: Exit.NOT_FOUND,
    errors.BaseModelUnavailable: Exit.NOT_FOUND,
    errors.Unauthenticated: Exit.NOT_PERMITTED,
    errors.PermissionDenied: Exit.NOT_PERMITTED,
    errors.QuotaExceeded: Exit.NOT_PERMITTED,
    errors.Conflict: Exit.CONFLICT,
    errors.ResourceError: Exit.UNAVAILABLE,
    errors.TransientError: Exit.UNAVAILABLE,
    WaitTimeout: Exit.TIMED_OUT,
}
STATUS = {"succeeded": Exit.OK, "failed": Exit.FAILED, "cancelled": Exit.CANCELLED}
"""Of a job that has ended."""


def code_of(error: errors.AppError) -> Exit:
    """The exit code that says this error."""
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
