"""What the supervisor and the trainer say to each other. No torch.

The trainer is told once, by `run.json` in its work directory, and answers with one JSON object per
line on the events pipe. Signals: SIGTERM stops at the next optimizer step with a resume checkpoint
(exit `EXIT_STOPPED`); SIGUSR1 writes a checkpoint and goes on. There is no other channel.

    work/
      run.json                     the RunOrder
      checkpoints/step-00000040/   complete as soon as a CheckpointEvent names it
        export/                    what PEFT loads
        resume/                    optimizer, schedule, RNG, data position
      trainer.log                  stdout and stderr of all ranks

Only rank 0 writes events. A checkpoint folder belongs to the reader once it is announced: the
supervisor publishes and removes it; `tunery train` keeps it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tunery.spec import TrainingSpec

EXIT_DONE = 0
EXIT_FAILED = 1
"""After a FailureEvent; without one the trainer died of something it could not report."""
EXIT_STOPPED = 75
"""Stopped as told, a resume checkpoint is written (EX_TEMPFAIL: run me again)."""

Phase = Literal["preparing", "training", "evaluating", "saving"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunOrder(_Message):
    """What one attempt is to do, and where its files lie on this machine."""

    run: str = Field(description="Names the run in every event: the job's id.")
    attempt: int = 1
    spec: TrainingSpec
    base_model_path: str = Field(description="Folder with config.json and safetensors.")
    model_paths: dict[str, str] = Field(
        default_factory=dict, description="Folders of further base models by name: a teacher, say."
    )
    training_path: str
    validation_path: str | None = None
    test_path: str | None = None
    resume_path: str | None = Field(
        None, description="A verified `resume` folder to continue from."
    )
    init_path: str | None = Field(None, description="A verified `export` folder to start from.")
    init_resume_path: str | None = Field(
        None, description="The verified `resume` folder of the same checkpoint: its optimizer too."
    )
    cache_dir: str | None = Field(None, description="For tokenised data; None turns the cache off.")


class _Event(_Message):
    run: str
    at: float = Field(description="Unix seconds when it was said.")


class PhaseEvent(_Event):
    kind: Literal["phase"] = "phase"
    phase: Phase


class StartEvent(_Event):
    """Said once, before the first step: what the run turned out to be."""

    kind: Literal["start"] = "start"
    total_steps: int
    start_step: int = Field(description="0, or the step resumed from.")
    trainable_parameters: int
    total_parameters: int
    examples: int
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    features: dict[str, Any] = Field(
        description="Which optimisations are active, the template's hash, versions, devices."
    )


class MetricsEvent(_Event):
    """Values at one optimizer step; `loss` is the mean over the step's supervised tokens."""

    kind: Literal["metrics"] = "metrics"
    step: int
    epoch: float
    values: dict[str, float] = Field(
        description="`train_loss`, `learning_rate`, `grad_norm`, `tokens_per_second`, "
        "`train_mean_token_accuracy`, `valid_loss`, ...; seconds and bytes are named so."
    )
    trained_tokens: int = Field(description="Supervised tokens consumed since step 0.")
    seconds_remaining: float | None = None


class CheckpointEvent(_Event):
    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str = Field(description="The complete folder, absolute.")
    kinds: tuple[Literal["export", "resume"], ...]
    metrics: dict[str, float]
    final: bool = False


class WarningEvent(_Event):
    kind: Literal["warning"] = "warning"
    code: str
    message: str
    data: dict[str, Any] = {}


class FailureEvent(_Event):
    """The last word of a run that cannot go on."""

    kind: Literal["failure"] = "failure"
    code: str
    category: Literal["user_data", "user_config", "capacity", "platform", "unknown"]
    retryable: bool
    message: str
    hint: str | None = None
    step: int | None = None


class DoneEvent(_Event):
    kind: Literal["done"] = "done"
    step: int
    trained_tokens: int
    metrics: dict[str, float]
    peak_memory_bytes: int | None = None


Event = Annotated[
    PhaseEvent
    | StartEvent
    | MetricsEvent
    | CheckpointEvent
    | WarningEvent
    | FailureEvent
    | DoneEvent,
    Field(discriminator="kind"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def read_event(line: str | bytes) -> Event:
    """Parse one line of the events pipe.

    Raises:
        pydantic.ValidationError: not an event.
    """
    return _EVENT.validate_json(line)
