"""The tables. What may follow what is also enforced by `job_guard` (see `migrations/`).

Bigint keys stay inside; `public_id` is what the world sees. Times are timestamptz and are compared
with the database's clock only.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NOW = text("clock_timestamp()")


class Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own protocol
        int: BigInteger,
        str: Text,
        float: Double,
        bool: Boolean,
        bytes: LargeBinary,
        datetime: TIMESTAMP(timezone=True),
        # None is SQL's null, not JSON's.
        dict[str, Any]: JSONB(none_as_null=True),
        list[dict[str, Any]]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text),
    }


class ProjectRow(Base):
    __tablename__ = "projects"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(unique=True)
    weight: Mapped[float] = mapped_column(server_default=text("1"))
    max_queued_jobs: Mapped[int | None]
    # Decayed GPU seconds of ended attempts, as of `gpu_usage_at`: the fair share's memory.
    gpu_usage: Mapped[float] = mapped_column(server_default=text("0"))
    gpu_usage_at: Mapped[datetime] = mapped_column(server_default=NOW)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class ApiKeyRow(Base):
    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    secret_sha256: Mapped[bytes]
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class FileRow(Base):
    __tablename__ = "files"
    __table_args__ = (Index("files_by_project", "project_id", "id"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    status: Mapped[str]  # uploaded, processed, error
    status_details: Mapped[str | None]
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    store_key: Mapped[str]
    content_type: Mapped[str]
    suffix: Mapped[str] = mapped_column(server_default="")
    format: Mapped[str | None]
    rows: Mapped[int | None]
    labels: Mapped[list[str] | None]
    validation: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class UploadRow(Base):
    __tablename__ = "uploads"
    __table_args__ = (
        Index("uploads_pending", "expires_at", postgresql_where=text("status = 'pending'")),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    size_bytes: Mapped[int]
    status: Mapped[str]  # pending, completed, cancelled, expired
    file_expires_after_s: Mapped[int | None]
    file_id: Mapped[int | None] = mapped_column(ForeignKey("files.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime]


class UploadPartRow(Base):
    __tablename__ = "upload_parts"
    __table_args__ = (Index("upload_parts_by_upload", "upload_id"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    upload_id: Mapped[int] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"))
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    store_key: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class JobRow(Base):
    """One fine-tuning job. `state` is written by `core.db.claims` and `core.db.jobs` alone."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "state in ('validating','queued','starting','running','finishing','paused',"
            "'succeeded','failed','cancelled')",
            name="jobs_state",
        ),
        CheckConstraint(
            "(state in ('starting','running','finishing')) = (owner is not null)",
            name="jobs_owner",
        ),
        CheckConstraint("(owner is null) = (lease_until is null)", name="jobs_lease"),
        CheckConstraint(
            "(state = 'succeeded') = (final_checkpoint_id is not null)", name="jobs_result"
        ),
        # A queued job that nobody may claim would wait for ever: an obeyed wish is a move.
        CheckConstraint(
            "state <> 'queued' or (cancel_requested_at is null and pause_requested_at is null)",
            name="jobs_queued_is_runnable",
        ),
        Index(
            "jobs_ready",
            "queue",
            text("priority desc"),
            "run_after",
            "id",
            postgresql_where=text("state = 'queued'"),
        ),
        # Not on lease_until: heartbeats must stay heap-only.
        Index("jobs_owned", "id", postgresql_where=text("owner is not null")),
        Index("jobs_by_project", "project_id", "id"),
        Index(
            "jobs_open",
            "project_id",
            postgresql_where=text("state not in ('succeeded','failed','cancelled')"),
        ),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    # What was asked, what it was resolved to.
    model: Mapped[str]
    method: Mapped[str]
    suffix: Mapped[str | None]
    seed: Mapped[int]
    training_file_id: Mapped[int] = mapped_column(ForeignKey("files.id"))
    validation_file_id: Mapped[int | None] = mapped_column(ForeignKey("files.id"))
    request: Mapped[dict[str, Any]]
    spec: Mapped[dict[str, Any]]
    resolved: Mapped[dict[str, Any]]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    integrations: Mapped[list[dict[str, Any]] | None]
    # The state machine.
    state: Mapped[str] = mapped_column(server_default="queued")
    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # fencing token
    error_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    max_errors: Mapped[int] = mapped_column(Integer, server_default=text("3"))
    lost_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    max_lost: Mapped[int] = mapped_column(Integer, server_default=text("3"))
    owner: Mapped[str | None]
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    queue: Mapped[str] = mapped_column(server_default="default")
    gpus: Mapped[int] = mapped_column(Integer, server_default=text("1"))
    priority: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    run_after: Mapped[datetime] = mapped_column(server_default=NOW)
    hold: Mapped[bool] = mapped_column(server_default=text("false"))  # start: "manual"
    cancel_requested_at: Mapped[datetime | None]
    pause_requested_at: Mapped[datetime | None]
    checkpoint_requested_at: Mapped[datetime | None]
    # What is known of the run.
    phase: Mapped[str] = mapped_column(server_default="waiting_for_capacity")
    last_step: Mapped[int] = mapped_column(server_default=text("0"))
    total_steps: Mapped[int | None]
    epoch: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    seconds_remaining: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    gpu_seconds: Mapped[float] = mapped_column(server_default=text("0"))
    peak_memory_bytes: Mapped[int | None]
    progress_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]  # of the current attempt
    resumed_from_step: Mapped[int | None]
    facts: Mapped[dict[str, Any] | None]  # the trainer's StartEvent
    error: Mapped[dict[str, Any] | None]  # {code, message, param, category, retriable, hint}
    fine_tuned_model: Mapped[str | None]
    final_checkpoint_id: Mapped[int | None] = mapped_column(
        ForeignKey("checkpoints.id", use_alter=True, name="jobs_final_checkpoint")
    )
    result_file_id: Mapped[int | None] = mapped_column(ForeignKey("files.id"))
    last_event_seq: Mapped[int] = mapped_column(server_default=text("1"))  # 1: its creation
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    finished_at: Mapped[datetime | None]


class OutboxRow(Base):
    """A wake-up owed to the workers of a queue."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    queue: Mapped[str]
    not_before: Mapped[datetime] = mapped_column(server_default=NOW)


class JobEventRow(Base):
    """A job's history. `seq` grows by one per job, in commit order."""

    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    seq: Mapped[int]
    attempt: Mapped[int] = mapped_column(Integer)
    level: Mapped[str] = mapped_column(server_default="info")  # info, warn, error
    type: Mapped[str] = mapped_column(server_default="message")  # message, metrics
    kind: Mapped[str]  # status, phase, metrics, checkpoint, evaluation, warning, retry
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    from_state: Mapped[str | None]
    to_state: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class JobMetricRow(Base):
    """One logged value. A resumed attempt overwrites the steps that it trains again."""

    __tablename__ = "job_metrics"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[float]
    attempt: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class JobLogRow(Base):
    """A chunk of a trainer's output. `seq` is per job."""

    __tablename__ = "job_logs"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    seq: Mapped[int]
    attempt: Mapped[int] = mapped_column(Integer)
    text: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class CheckpointRow(Base):
    """A published checkpoint: complete, and never changed. One row per kind set and step."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "attempt", "step"),)

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int]
    kinds: Mapped[list[str]]  # export, resume
    prefix: Mapped[str]  # of its keys in the store
    manifest: Mapped[list[dict[str, Any]]]  # [{path, bytes, sha256, role}]
    size_bytes: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    name: Mapped[str]  # fine_tuned_model_checkpoint
    final: Mapped[bool] = mapped_column(server_default=text("false"))
    corrupt_at: Mapped[datetime | None]
    resume_dropped_at: Mapped[datetime | None]  # retention removed the resume half
    deleted_at: Mapped[datetime | None]  # its owner deleted the model
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class WorkerRow(Base):
    """A worker as it last described itself."""

    __tablename__ = "workers"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(unique=True)
    host: Mapped[str]
    pid: Mapped[int]
    queues: Mapped[list[str]]
    devices: Mapped[list[dict[str, Any]]]
    versions: Mapped[dict[str, Any]]
    cached_models: Mapped[list[str]]
    drain_requested_at: Mapped[datetime | None]
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=NOW)


class InspectionRow(Base):
    """A dry run's question to the workers: what does the base's tokenizer make of these files?

    Gone after minutes, answered or not; it decides nothing.
    """

    __tablename__ = "inspections"
    __table_args__ = (
        Index("inspections_open", "queue", "id", postgresql_where=text("answer is null")),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    queue: Mapped[str]
    spec: Mapped[dict[str, Any]]
    training_file_id: Mapped[int] = mapped_column(ForeignKey("files.id"))
    validation_file_id: Mapped[int | None] = mapped_column(ForeignKey("files.id"))
    asked_at: Mapped[datetime] = mapped_column(server_default=NOW)
    taken_at: Mapped[datetime | None]
    answer: Mapped[dict[str, Any] | None]


class IdempotencyRow(Base):
    """A create that was answered, so that a retry gets the same answer."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        UniqueConstraint("project_id", "route", "key"),
        Index("idempotency_by_body", "body_sha256", "created_at"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    route: Mapped[str]
    key: Mapped[str | None]  # None: known by body hash and retry count alone
    body_sha256: Mapped[bytes]
    retry_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    status_code: Mapped[int | None] = mapped_column(Integer)
    response: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
