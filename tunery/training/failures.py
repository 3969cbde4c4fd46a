"""What a run's failure is called. Messages carry names and numbers, never training text."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from tunery.errors import (
    AppError,
    BaseModelUnavailable,
    CheckpointCorrupt,
    InvalidData,
    NonFiniteLoss,
    ResourceError,
    TransientError,
    UserError,
)
from tunery.training.memory import is_out_of_memory
from tunery.training.protocol import FailureEvent

if TYPE_CHECKING:
    from typing import Literal

    Category = Literal["user_data", "user_config", "capacity", "platform", "unknown"]

_CATEGORIES: tuple[tuple[type[AppError], Category], ...] = (
    (InvalidData, "user_data"),
    (NonFiniteLoss, "user_config"),
    (BaseModelUnavailable, "platform"),
    (UserError, "user_config"),
    (ResourceError, "capacity"),
    (TransientError, "platform"),
    (CheckpointCorrupt, "platform"),
)


def failure(run: str, error: BaseException, step: int | None = None) -> FailureEvent:
    """The event for an error that ends the run.

    Of errors that are not ours only the class is named: their words may quote the data.
    """
    if isinstance(error, AppError):
        return FailureEvent(
            run=run,
            at=time.time(),
            code=error.code,
            category=next((c for cls, c in _CATEGORIES if isinstance(error, cls)), "unknown"),
            retryable=error.retryable,
            message=error.message,
            hint=error.hint,
            step=step,
        )
    code, category, message, retryable, hint = _foreign(error)
    return FailureEvent(
        run=run,
        at=time.time(),
        code=code,
        category=category,
        retryable=retryable,
        message=message,
        hint=hint,
        step=step,
    )


def _foreign(error: BaseException) -> tuple[str, Category, str, bool, str | None]:
    """Code, category, message, retryable and hint."""
    name = type(error).__name__
    if is_out_of_memory(error):
        return (
            "out_of_memory",
            "capacity",
            "the device's memory is used up",
            False,
            "lower max_length or micro_batch_tokens, or switch gradient_checkpointing on",
        )
    if _is_lost_rank(error):
        return "worker_lost", "platform", "another rank of the run went away", True, None
    if isinstance(error, RuntimeError) and "CUDA" in str(error):
        return "cuda_error", "platform", f"the device failed ({name})", True, None
    if isinstance(error, OSError):
        return "internal_error", "platform", f"reading or writing failed ({name})", True, None
    return (
        "internal_error",
        "unknown",
        f"the trainer failed ({name})",
        False,
        "the job's log has the traceback",
    )


def _is_lost_rank(error: BaseException) -> bool:
    """Whether talking to the other ranks failed; gloo says so with a bare RuntimeError."""
    words = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
