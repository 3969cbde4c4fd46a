"""Every setting, in one place. Read from `TUNERY_*`; printed by `tunery doctor`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where the service's parts are, and how patient they are with each other."""

    model_config = SettingsConfigDict(env_prefix="TUNERY_", extra="ignore", frozen=True)

    home: Path = Field(
        Path("~/.tunery"),
        description="Folder for state that is not set elsewhere: embedded "
        "databases, local artifacts, imported models.",
    )
    database_url: SecretStr = Field(
        SecretStr("postgresql+psycopg://localhost/tunery"),
        description="SQLAlchemy URL of Postgres, with the psycopg driver.",
    )
    broker_url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"),
        description="Celery's broker: redis://, rediss:// or redis+socket://.",
    )
    store_url: str | None = Field(
        None, description="Artifact store: file:///folder or s3://bucket/prefix; None: under home."
    )
    store_endpoint: str | None = Field(None, description="Endpoint of an S3-compatible store.")
    store_region: str = Field("us-east-1", description="Region of the S3 store.")
    store_access_key_id: SecretStr | None = Field(None, description="S3 access key.")
    store_secret_access_key: SecretStr | None = Field(None, description="S3 secret key.")
    models_dir: Path | None = Field(None, description="Imported base models; None: home/models.")
    hub_allowed: bool = Field(True, description="Whether base models may come from a model hub.")
    host: str = Field("127.0.0.1", description="Address that the API binds to.")
    port: int = Field(8300, ge=0, le=65535, description="Port that the API binds to.")
    max_file_bytes: int = Field(8 << 30, ge=1, description="Largest data file accepted.")
    max_queued_jobs: int = Field(
        1000, ge=1, description="Queued and running jobs a project may have."
    )
    dry_run_wait_s: float = Field(
        30.0,
        ge=0,
        description="How long a dry run waits for a worker to read the files with the base model's "
        "tokenizer; 0 leaves that to the start of the job.",
    )
    lease_s: float = Field(60.0, gt=0, description="How long a worker's claim lasts unrenewed.")
    beat_s: float = Field(15.0, gt=0, description="How often a worker renews its claim.")
    reap_s: float = Field(5.0, gt=0, description="How often lapsed leases are looked for.")
    relay_s: float = Field(1.0, gt=0, description="How often the outbox is emptied unprompted.")
    stop_grace_s: float = Field(
        30.0,
        gt=0,
        description="How long a trainer may take to checkpoint and exit when told to stop.",
    )
    no_progress_s: float = Field(
        1800.0, gt=0, description="Silence of a running trainer after which it is taken for hung."
    )
    retry_backoff_s: float = Field(
        10.0,
        ge=0,
        description="Wait before the second attempt; it doubles with each, up to 10 min.",
    )
    devices: str = Field(
        "auto",
        description="Devices that a worker offers: auto, cpu, cpu:N for N slots, or GPU indices "
        "such as 0,1,2,3.",
    )
    queues: str = Field("default", description="Queues that a worker serves, comma-separated.")
    worker_id: str | None = Field(None, description="Name of this worker; None: host and pid.")
    launcher: str = Field(
        "tunery.training.launch:launch",
        description="What starts a job's ranks: module:function, given the attempt's work folder "
        "and the events descriptor; returns the exit code.",
    )
    scratch_dir: Path | None = Field(
        None, description="Work folders of running attempts; None: home/scratch."
    )
    max_log_bytes: int = Field(
        4 << 20, ge=1024, description="Trainer output kept per attempt, besides its last 64 KiB."
    )
    trainer_threads: int | None = Field(
        None, description="CPU threads of a trainer; None: the cores divided by the devices."
    )

    @property
    def deadman_s(self) -> float:
        """Silence after which the wrapper kills the trainer: before the lease can lapse."""
        return self.lease_s * 0.75

    def resolved_home(self) -> Path:
        return self.home.expanduser().resolve()

    def resolved_models_dir(self) -> Path:
        return (self.models_dir or self.resolved_home() / "models").expanduser().resolve()

    def resolved_scratch_dir(self) -> Path:
        return (self.scratch_dir or self.resolved_home() / "scratch").expanduser().resolve()

    def resolved_store_url(self) -> str:
        return self.store_url or (self.resolved_home() / "artifacts").as_uri()


@cache
def settings() -> Settings:
    """The process's settings, read once."""
    return Settings()
