"""What the service answers with. Unknown members are kept: a newer service may say more."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


class _Object(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class Job(_Object):
    """A fine-tuning job: OpenAI's members, and ours under `ext`."""

    status: str
    model: str
    created_at: int
    training_file: str
    validation_file: str | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    trained_tokens: int | None = None
    seed: int | None = None
    error: JobError | None = None
    result_files: list[str] = Field(default_factory=list)
    method: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    ext: dict[str, Any] = Field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether nothing will change it any more."""
        return self.status in TERMINAL

    @property
    def phase(self) -> str:
        """The finer status, for people."""
        return str(self.ext.get("phase") or self.status)

    @property
    def progress(self) -> dict[str, Any]:
        """`{step, total_steps, percent, tokens_per_second, seconds_remaining, ...}`."""
        return self.ext.get("progress") or {}

    @property
    def label(self) -> str:
        """Method and adapter in one word, such as `supervised-lora`."""
        spec = (self.ext.get("resolved") or {}).get("spec") or {}
        method = (self.method or {}).get("type") or "supervised"
        adapter = (spec.get("adapter") or {}).get("type")
        return f"{method}-{adapter}" if adapter else method

    def _repr_html_(self) -> str:
        from tunery.client.card import job_card

        return job_card(self)


class Event(_Object):
    """Something that a job said."""

    created_at: int
    level: str
    message: str
    type: str = "message"
    data: dict[str, Any] | None = None
    ext: dict[str, Any] = Field(default_factory=dict)

    @property
    def kind(self) -> str:
        """status, phase, metrics, checkpoint, evaluation, warning, retry or resource."""
        return str((self.data or {}).get("kind") or self.type)


class Checkpoint(_Object):
    """A checkpoint that is complete and never changes."""

    step_number: int
    created_at: int
    fine_tuned_model_checkpoint: str
    metrics: dict[str, Any] = Field(default_factory=dict)
    ext: dict[str, Any] = Field(default_factory=dict)


class ManifestFile(BaseModel):
    """One file of a checkpoint."""

    path: str
    bytes: int
    sha256: str
    role: str = ""


class File(_Object):
    """An uploaded or produced file."""

    filename: str
    bytes: int
    purpose: str
    created_at: int
    status: str | None = None
    ext: dict[str, Any] = Field(default_factory=dict)


class Metrics(BaseModel):
    """Logged points of a job: per metric, its (step, value) pairs in order of steps."""

    points: dict[str, list[tuple[int, float]]]

    def series(self, name: str) -> list[tuple[int, float]]:
        """The points of one metric; empty when it was never logged."""
        return self.points.get(name, [])

    def to_pandas(self) -> Any:
        """A pandas frame with a column per metric, indexed by step; pandas must be installed."""
        import pandas  # type: ignore[import-untyped]

        columns = {name: pandas.Series(dict(points)) for name, points in self.points.items()}
        frame = pandas.DataFrame(columns)
        frame.index.name = "step"
        return frame
