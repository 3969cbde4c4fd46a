from __future__ import annotations

import pytest

from tunery.errors import BaseModelUnavailable, InvalidData, OutOfMemory, StoreUnavailable
from tunery.training.protocol import FailureEvent
from worker import failures
from worker.failures import Ending
from worker.lifeline import Reason
from worker.process import Exit


@pytest.mark.parametrize(
    ("end", "log", "code", "retryable"),
    [
        (Exit(-9, Reason.EXITED), "", "out_of_memory", True),
        (Exit(128 + 9, Reason.EXITED), "", "out_of_memory", True),
        (Exit(-11, Reason.EXITED), "", "internal_error", True),
        (Exit(1, Reason.EXITED), "", "internal_error", True),
        (Exit(0, Reason.EXITED), "", "internal_error", True),
        (Exit(1, Reason.EXITED), "RuntimeError: CUDA error: device-side", "cuda_error", True),
        (Exit(None, None), "", "worker_lost", True),
        (Exit(-9, Reason.DEADMAN), "", "worker_lost", True),
    ],
)
def test_a_death_without_a_word_gets_a_code(
    end: Exit, log: str, code: str, retryable: bool
) -> None:
    failure = failures.of_exit(end, log)
    assert (failure.code, failure.retryable) == (code, retryable)


def test_the_signal_is_named() -> None:
    assert "SIGSEGV" in failures.of_exit(Exit(-11, Reason.EXITED), "").message
    assert "code 3" in failures.of_exit(Exit(3, Reason.EXITED), "").message


@pytest.mark.parametrize(
    ("error", "category", "retryable"),
    [
        (InvalidData("bad"), "user_data", False),
        (BaseModelUnavailable("gone"), "user_config", False),
        (OutOfMemory("full"), "capacity", False),
        (StoreUnavailable("away"), "platform", True),
    ],
)
def test_our_own_errors_say_who_can_fix_them(
    error: Exception, category: str, retryable: bool
) -> None:
    failure = failures.of_error(error)  # type: ignore[arg-type]
    assert (failure.category, failure.retryable) == (category, retryable)


def test_the_trainers_word_is_passed_on() -> None:
    event = FailureEvent(
        run="r",
        at=0,
        code="non_finite_loss",
        category="user_config",
        retryable=False,
        message="loss is nan at step 3",
        hint="lower the learning rate",
        step=3,
    )
    assert failures.of_event(event).as_json() == {
        "code": "non_finite_loss",
        "message": "loss is nan at step 3",
        "param": None,
        "category": "user_config",
        "retriable": False,
        "hint": "lower the learning rate",
    }


def test_only_what_needs_no_checkpoint_ends_at_once() -> None:
    assert {ending for ending in Ending if ending.at_once} == {
        Ending.CANCEL,
        Ending.NO_PROGRESS,
        Ending.FENCED,
    }
