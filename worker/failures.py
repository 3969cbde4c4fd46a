"""Why an attempt ended, in the words of the public contract."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tunery.errors import AppError, ResourceError, UserError
from worker.lifeline import Reason

if TYPE_CHECKING:
    from pathlib import Path

    from tunery.training.protocol import FailureEvent
    from worker.process import Exit


_SIGNALLED = 128
"""Added to a signal's number in exit codes, as shells do."""


class Ending(StrEnum):
    """Why the supervisor ends an attempt before the trainer does."""

    CANCEL = "cancel"  #: the user's wish: kill
    PAUSE = "pause"  #: the user's wish: stop with a checkpoint
    DRAIN = "drain"  #: the worker's: stop with a checkpoint
    TIME_LIMIT = "time_limit"  #: the job's runtime is used up: stop with a checkpoint
    NO_PROGRESS = "no_progress"  #: silent for too long: kill
    FENCED = "fenced"  #: the job is somebody else's by now: kill, write nothing

    @property
    def at_once(self) -> bool:
        """Whether there is nothing to wait for."""
        return self in (Ending.CANCEL, Ending.NO_PROGRESS, Ending.FENCED)


@dataclass(frozen=True)
class Failure:
    """An error for the job's row, and whether another attempt may help."""

    code: str
    category: str
    """user_data, user_config, quota, capacity, platform or unknown."""
    message: str
    retryable: bool
    hint: str | None = None
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "category": self.category,
            "retriable": self.retryable,
            "hint": self.hint,
        }


def of_event(event: FailureEvent) -> Failure:
    """The trainer's own word."""
    return Failure(event.code, event.category, event.message, event.retryable, event.hint)


def of_error(error: AppError) -> Failure:
    """Something that went wrong in the supervisor's hands."""
    category = "platform"
    if isinstance(error, UserError):
        category = "user_data" if "file" in error.code else "user_config"
    elif isinstance(error, ResourceError):
        category = "capacity"
    return Failure(error.code, category, error.message, error.retryable, error.hint, error.param)


def time_limit(limit_s: float) -> Failure:
    return Failure(
        "time_limit",
        "quota",
        f"the job did not finish within {limit_s:g} s",
        retryable=False,
        hint="raise ext.limits.max_runtime_s, or continue from the checkpoint that was written",
    )


def disk_full(folder: Path) -> Failure:
    return Failure(
        "capacity_unavailable",
        "capacity",
        "the worker's disk is full",
        retryable=True,
        hint=f"free space under {folder.name}, or set TUNERY_SCRATCH_DIR to a larger disk",
    )


def no_progress(silence_s: float) -> Failure:
    return Failure(
        "no_progress",
        "platform",
        f"the trainer was silent for {silence_s:.0f} s and was killed",
        retryable=True,
        hint="TUNERY_NO_PROGRESS_S sets the patience; it must exceed the longest single step",
    )


def of_exit(end: Exit, last_lines: str) -> Failure:
    """A trainer that ended without saying why."""
    if end.reason is None:
        return Failure("worker_lost", "platform", "the trainer's lifeline was killed", True)
    if end.reason is Reason.DEADMAN:
        return Failure("worker_lost", "platform", "the worker lost touch with the database", True)
    if end.code is not None and end.code < 0:
        return _of_signal(-end.code, last_lines)
    if end.code is not None and end.code > _SIGNALLED:  # a rank, says the launcher
        return _of_signal(end.code - _SIGNALLED, last_lines)
    if end.code == 0:
        return _internal("the trainer left without a result", last_lines)
    return _internal(f"the trainer exited with code {end.code} without saying why", last_lines)


def _of_signal(number: int, last_lines: str) -> Failure:
    if number == signal.SIGKILL:
        return Failure(
            "out_of_memory",
            "capacity",
            "the trainer was killed by signal 9, most likely by the kernel for want of memory",
            retryable=True,
            hint="a shorter max_length, a smaller micro_batch_tokens or a larger machine",
        )
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return _internal(f"the trainer was killed by {name}", last_lines)


def _internal(message: str, last_lines: str) -> Failure:
    if "CUDA error" in last_lines or "NCCL error" in last_lines:
        return Failure("cuda_error", "platform", message + "; its log names a CUDA error", True)
    return Failure(
        "internal_error", "platform", message, True, hint="the job's log holds its last words"
    )
