from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunery.training.protocol import DoneEvent, MetricsEvent, PhaseEvent, StartEvent, WarningEvent
from worker.reporting import Report


def measured(step: int, **values: float) -> MetricsEvent:
    return MetricsEvent(
        run="r",
        at=0.0,
        step=step,
        epoch=step / 10,
        values=values or {"train_loss": 1.0 / step},
        trained_tokens=step * 7,
        seconds_remaining=10.0 - step,
    )


def started(step: int = 0) -> StartEvent:
    return StartEvent(
        run="r",
        at=0.0,
        total_steps=10,
        start_step=step,
        trainable_parameters=1,
        total_parameters=2,
        examples=3,
        tokens_per_epoch=4,
        trained_tokens_per_epoch=5,
        features={"packing": True},
    )


def report(*events: Any) -> Report:
    made = Report()
    for event in events:
        made.add(event)
    return made


def test_every_step_is_a_point_and_the_newest_is_an_event() -> None:
    batch = report(started(), measured(1), measured(2, train_loss=0.25, valid_loss=0.5)).take()
    assert batch.points == (
        (1, {"train_loss": 1.0, "epoch": 0.1}),
        (2, {"train_loss": 0.25, "valid_loss": 0.5, "epoch": 0.2}),
    )
    (note,) = batch.notes
    assert note.message == "Step 2/10: training loss=0.2500, validation loss=0.5000"
    assert (note.type, note.kind, note.data["step"]) == ("metrics", "metrics", 2)
    assert (batch.step, batch.started, batch.progress.trained_tokens) == (2, True, 14)


def test_a_resumed_run_says_from_where_and_counts_from_there() -> None:
    batch = report(started(6)).take()
    assert (batch.step, batch.started, batch.progress.resumed_from_step) == (6, False, 6)
    assert "step 6" in batch.notes[0].message
    assert batch.progress.facts is not None
    assert batch.progress.facts["features"] == {"packing": True}


def test_an_evaluation_before_the_first_step_does_not_start_the_run() -> None:
    made = report(started(), measured(0, valid_loss=2.0))
    assert not made.take().started
    made.add(measured(1))
    assert made.take().started
    assert not report(started(6), measured(6, valid_loss=2.0)).take().started


def test_evaluations_between_steps_do_not_fill_the_history() -> None:
    made = report(PhaseEvent(run="r", at=0, phase="preparing"), measured(1))
    made.take()
    for _ in range(5):
        made.add(PhaseEvent(run="r", at=0, phase="evaluating"))
        made.add(PhaseEvent(run="r", at=0, phase="training"))
    batch = made.take()
    assert batch.notes == ()
    assert batch.progress.phase == "training"


def test_warnings_keep_their_code() -> None:
    event = WarningEvent(run="r", at=0, code="micro_batch_halved", message="m", data={"to": 4})
    (note,) = report(event).take().notes
    assert (note.level, note.data) == ("warn", {"code": "micro_batch_halved", "to": 4})


def test_after_taking_nothing_waits_but_what_was_reached_stays() -> None:
    made = report(measured(3), DoneEvent(run="r", at=0, step=3, trained_tokens=21, metrics={}))
    made.take()
    assert not made.waiting
    assert (made.step, made.started, made.take().step) == (3, True, 3)


@given(st.lists(st.booleans(), max_size=12))
def test_batches_that_fail_to_be_written_lose_and_reorder_nothing(fails: list[bool]) -> None:
    made = report(started())
    written: list[int] = []
    for step, failed in enumerate([*fails, False], start=1):
        made.add(measured(step))
        batch = made.take()
        if failed:
            made.give_back(batch)
        else:
            written += [at for at, _ in batch.points]
            assert batch.progress.trained_tokens == step * 7
    assert written == list(range(1, len(fails) + 2))
