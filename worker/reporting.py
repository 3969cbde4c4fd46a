"""What the trainer said, gathered until it is written to the record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.db.claims import Progress
from tunery.training.protocol import (
    DoneEvent,
    FailureEvent,
    MetricsEvent,
    PhaseEvent,
    StartEvent,
    WarningEvent,
)

if TYPE_CHECKING:
    from tunery.training.protocol import Event

PHASES = {
    "preparing": "Preparing the model and the data",
    "training": "Training",
    "evaluating": "Evaluating",
    "saving": "Saving a checkpoint",
}


@dataclass(frozen=True)
class Note:
    """One event for the job's history."""

    kind: str
    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What is written in one transaction."""

    points: tuple[tuple[int, dict[str, float]], ...]
    notes: tuple[Note, ...]
    step: int
    """Steps done, this attempt and before."""
    progress: Progress
    started: bool
    """The first step is done."""


class Report:
    """Takes events, gives batches. A batch that could not be written is given back."""

    def __init__(self) -> None:
        self._points: list[tuple[int, dict[str, float]]] = []
        self._notes: list[Note] = []
        self._latest: MetricsEvent | None = None
        self._progress: dict[str, Any] = {}
        self._phase = ""
        self.total_steps: int | None = None
        self.step = self._first = 0
        self.started = False
        self.failure: FailureEvent | None = None
        self.done: DoneEvent | None = None

    def add(self, event: Event) -> None:
        """Take one event; checkpoints are somebody else's business."""
        match event:
            case PhaseEvent():
                self._enter(event.phase)
            case StartEvent():
                self._start(event)
            case MetricsEvent():
                self._measure(event)
            case WarningEvent():
                data = {"code": event.code, **event.data}
                self.note(Note("warning", event.message, level="warn", data=data))
            case FailureEvent():
                self.failure = event
            case DoneEvent():
                self.done = event
                self._progress["peak_memory_bytes"] = event.peak_memory_bytes
            case _:
                pass

    def note(self, note: Note) -> None:
        """Add to the history."""
        self._notes.append(note)

    def phase(self, phase: str) -> None:
        """What people are shown as being done, without an event of its own."""
        self._progress["phase"] = phase

    def _enter(self, phase: str) -> None:
        self._progress["phase"] = phase
        # An evaluation every few steps would drown the history.
        if phase != self._phase and phase in ("preparing", "training") and not self.started:
            self.note(Note("phase", PHASES[phase], data={"phase": phase}))
        self._phase = phase

    def _start(self, event: StartEvent) -> None:
        self.total_steps = event.total_steps
        self._progress["total_steps"] = event.total_steps
        self._progress["facts"] = event.model_dump(exclude={"kind", "run", "at"})
        if event.start_step:
            self.step = self._first = event.start_step
            self._progress["resumed_from_step"] = event.start_step
            message = f"Resumed from the checkpoint of step {event.start_step}"
            self.note(Note("phase", message, data={"step": event.start_step}))

    def _measure(self, event: MetricsEvent) -> None:
        self._points.append((event.step, {**event.values, "epoch": event.epoch}))
        self._latest = event
        # The base model's own evaluation comes before the first step.
        self.started = self.started or event.step > self._first
        self.step = max(self.step, event.step)
        self._progress |= {
            "epoch": event.epoch,
            "trained_tokens": event.trained_tokens,
            "seconds_remaining": event.seconds_remaining,
        }
        if "tokens_per_second" in event.values:
            self._progress["tokens_per_second"] = event.values["tokens_per_second"]

    @property
    def waiting(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._points or self._notes or self._progress)

    def take(self) -> Batch:
        """Everything gathered. Of the metrics, the history gets the newest: the rest are points."""
        notes = list(self._notes)
        if self._latest is not None:
            notes.append(self._metrics_note(self._latest))
        batch = Batch(
            tuple(self._points), tuple(notes), self.step, Progress(**self._progress), self.started
        )
        self._points, self._notes, self._latest, self._progress = [], [], None, {}
        return batch

    def give_back(self, batch: Batch) -> None:
        """It was not written: it comes before what was gathered since."""
        self._points[:0] = batch.points
        self._notes[:0] = batch.notes
        old = {name: value for name, value in vars(batch.progress).items() if value is not None}
        self._progress = old | self._progress

    def _metrics_note(self, event: MetricsEvent) -> Note:
        of = f"/{self.total_steps}" if self.total_steps else ""
        names = {"train_loss": "training loss", "valid_loss": "validation loss"}
        values = ", ".join(
            f"{title}={event.values[name]:.4f}"
            for name, title in names.items()
            if name in event.values
        )
        message = f"Step {event.step}{of}" + (f": {values}" if values else "")
        data = {"step": event.step, "epoch": event.epoch, **event.values}
        return Note("metrics", message, type="metrics", data=data)
