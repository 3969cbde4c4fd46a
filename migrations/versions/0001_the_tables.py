"""The tables, and the guard that holds what may follow what.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NOW = sa.text("clock_timestamp()")

# 24 base-62 characters. Bytes 6 and 8 of a version 4 uuid are not wholly random: left out.
PUBLIC_ID = """
create function new_public_id(prefix text) returns text language sql volatile as $$
  select prefix || string_agg(
    substr('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz',
           get_byte(drawn.bytes, i) % 62 + 1, 1), '')
  from (select uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) as bytes) as drawn,
       unnest(array[0,1,2,3,4,5,7,9,10,11,12,13,
                    16,17,18,19,20,21,23,25,26,27,28,29]) as i
$$
"""

# A job's first event, and the wake-up it owes, belong to the insert itself.
JOB_BORN = """
create function job_born() returns trigger language plpgsql as $$ begin
  insert into job_events (public_id, job_id, seq, attempt, kind, message, to_state)
    values (new_public_id('ftevent-'), new.id, 1, 0, 'status',
            'Created fine-tuning job: ' || new.public_id, new.state);
  if new.state = 'queued' and not new.hold then
    insert into outbox (queue, not_before) values (new.queue, new.run_after);
  end if;
  return null;
end $$
"""

# What is said of a move. Counters tell a retry from a yield.
JOB_STORY = """
create function job_story(old jobs, new jobs) returns text language sql immutable as $$
  select case
    when new.state = 'queued' and old.state = 'validating'
      then 'Files validated, moving job to queued state'
    when new.state = 'queued' and old.state = 'paused' then 'The job was resumed and waits'
    when new.state = 'queued' and new.error_count > old.error_count
      then format('Attempt %s failed and will be retried: %s', new.attempt,
                  coalesce(new.error ->> 'message', 'no reason was given'))
    when new.state = 'queued' and new.lost_count > old.lost_count
      then format('The worker of attempt %s was lost; the job waits for another', new.attempt)
    when new.state = 'queued'
      then format('Attempt %s was given back by its worker; the job waits', new.attempt)
    when new.state = 'starting' then format('Attempt %s was claimed by a worker', new.attempt)
    when new.state = 'running' and new.attempt = 1 then 'Fine-tuning job started'
    when new.state = 'running' then format('Training goes on in attempt %s', new.attempt)
    when new.state = 'finishing' then 'Training is done, publishing the result'
    when new.state = 'succeeded' then 'The job has successfully completed'
    when new.state = 'failed'
      then 'The job failed: ' || coalesce(new.error ->> 'message', 'no reason was given')
    when new.state = 'cancelled' then 'The job was cancelled'
    when new.state = 'paused' then 'The job was paused'
  end
$$
"""

# Holds, whoever writes: legal moves only, terminal rows frozen, the attempt grows with a claim
# and never else, every move leaves exactly one event, a queued job is owed a wake-up.
JOB_GUARD = """
create function job_guard() returns trigger language plpgsql as $$
declare
  retried boolean;
begin
  if new.attempt <> old.attempt + (old.state = 'queued' and new.state = 'starting')::int then
    raise exception 'attempt % -> % outside a claim', old.attempt, new.attempt
      using errcode = 'check_violation';
  end if;
  if old.state in ('succeeded', 'failed', 'cancelled') then
    if to_jsonb(new) - array['metadata', 'last_event_seq']
       is distinct from to_jsonb(old) - array['metadata', 'last_event_seq'] then
      raise exception 'job % is %: its row is frozen', old.public_id, old.state
        using errcode = 'check_violation';
    end if;
    return new;
  end if;
  if new.state = old.state then
    return new;
  end if;
  if (old.state, new.state) not in (
    ('validating', 'queued'), ('validating', 'failed'), ('validating', 'cancelled'),
    ('queued', 'starting'), ('queued', 'paused'), ('queued', 'cancelled'),
    ('starting', 'running'), ('starting', 'queued'), ('starting', 'paused'),
    ('starting', 'failed'), ('starting', 'cancelled'),
    ('running', 'finishing'), ('running', 'queued'), ('running', 'paused'),
    ('running', 'failed'), ('running', 'cancelled'),
    ('finishing', 'succeeded'), ('finishing', 'queued'), ('finishing', 'paused'),
    ('finishing', 'failed'), ('finishing', 'cancelled'),
    ('paused', 'queued'), ('paused', 'cancelled')
  ) then
    raise exception 'illegal transition % -> %', old.state, new.state
      using errcode = 'check_violation';
  end if;

  if new.state = 'paused' then
    new.pause_requested_at := null;
  end if;
  if new.state in ('succeeded', 'failed', 'cancelled') then
    new.finished_at := clock_timestamp();
  end if;
  if new.state not in ('starting', 'running') then
    new.checkpoint_requested_at := null;
  end if;
  if new.phase = old.phase then
    new.phase := case new.state
      when 'queued' then
        case when new.run_after > clock_timestamp() then 'backing_off'
             else 'waiting_for_capacity' end
      when 'starting' then 'preparing'
      when 'running' then 'training'
      when 'finishing' then 'uploading'
      when 'paused' then 'paused'
      else 'done' end;
  end if;

  retried := new.state = 'queued'
    and (new.error_count > old.error_count or new.lost_count > old.lost_count);
  new.last_event_seq := old.last_event_seq + 1;
  insert into job_events (public_id, job_id, seq, attempt, level, kind, message, data,
                          from_state, to_state)
    values (new_public_id('ftevent-'), new.id, new.last_event_seq, new.attempt,
            case when new.state = 'failed' then 'error' when retried then 'warn' else 'info' end,
            case when retried then 'retry' else 'status' end,
            job_story(old, new),
            jsonb_strip_nulls(jsonb_build_object('code', new.error ->> 'code')),
            old.state, new.state);
  if new.state = 'queued' and not new.hold then
    insert into outbox (queue, not_before) values (new.queue, new.run_after);
  end if;
  return new;
end $$
"""

TABLES = (
    "outbox",
    "projects",
    "workers",
    "api_keys",
    "files",
    "idempotency_keys",
    "jobs",
    "uploads",
    "checkpoints",
    "job_events",
    "job_logs",
    "job_metrics",
    "upload_parts",
)
TRIGGERS = (
    "create trigger job_born after insert on jobs for each row execute function job_born()",
    "create trigger job_guard before update on jobs for each row execute function job_guard()",
)


def upgrade() -> None:
    _outbox()
    _projects()
    _workers()
    _api_keys()
    _files()
    _idempotency_keys()
    _jobs()
    _uploads()
    _checkpoints()
    _job_events()
    _job_logs()
    _job_metrics()
    _upload_parts()
    op.create_foreign_key(
        "jobs_final_checkpoint", "jobs", "checkpoints", ["final_checkpoint_id"], ["id"]
    )
    for statement in (PUBLIC_ID, JOB_BORN, JOB_STORY, JOB_GUARD, *TRIGGERS):
        op.execute(statement)


def downgrade() -> None:
    op.drop_constraint("jobs_final_checkpoint", "jobs", type_="foreignkey")
    op.execute("drop function job_story(jobs, jobs)")
    for table in reversed(TABLES):
        op.drop_table(table)
    for function in ("job_guard()", "job_born()", "new_public_id(text)"):
        op.execute(f"drop function {function}")


def _outbox() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column(
            "not_before", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.PrimaryKeyConstraint("id"),
    )


def _projects() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False),
        sa.Column("max_queued_jobs", sa.BigInteger(), nullable=True),
        sa.Column("gpu_usage", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "gpu_usage_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("public_id"),
    )


def _workers() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("queues", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("devices", postgresql.JSONB(), nullable=False),
        sa.Column("versions", postgresql.JSONB(), nullable=False),
        sa.Column("cached_models", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("drain_requested_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "started_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.Column(
            "heartbeat_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("public_id"),
    )


def _api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("revoked_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_used_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("public_id"),
    )


def _files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("status_details", sa.Text(), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("store_key", sa.Text(), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("suffix", sa.Text(), server_default="", nullable=False),
        sa.Column("format", sa.Text(), nullable=True),
        sa.Column("rows", sa.BigInteger(), nullable=True),
        sa.Column("labels", postgresql.ARRAY(sa.Text()), nullable=True),
        sa.Column("validation", postgresql.JSONB(), nullable=True),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("deleted_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("public_id"),
    )
    op.create_index("files_by_project", "files", ["project_id", "id"])


def _idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("body_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("retry_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("response", postgresql.JSONB(), nullable=True),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("project_id", "route", "key"),
    )
    op.create_index("idempotency_by_body", "idempotency_keys", ["body_sha256", "created_at"])


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("suffix", sa.Text(), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("training_file_id", sa.BigInteger(), nullable=False),
        sa.Column("validation_file_id", sa.BigInteger(), nullable=True),
        sa.Column("request", postgresql.JSONB(), nullable=False),
        sa.Column("spec", postgresql.JSONB(), nullable=False),
        sa.Column("resolved", postgresql.JSONB(), nullable=False),
        sa.Column("metadata", postgresql.JSONB(), nullable=True),
        sa.Column("integrations", postgresql.JSONB(), nullable=True),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("error_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_errors", sa.Integer(), server_default=sa.text("3"), nullable=False),
        sa.Column("lost_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_lost", sa.Integer(), server_default=sa.text("3"), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("queue", sa.Text(), server_default="default", nullable=False),
        sa.Column("gpus", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("priority", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "run_after", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.Column("hold", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("cancel_requested_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("pause_requested_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("checkpoint_requested_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("phase", sa.Text(), server_default="waiting_for_capacity", nullable=False),
        sa.Column("last_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("total_steps", sa.BigInteger(), nullable=True),
        sa.Column("epoch", sa.Double(), nullable=True),
        sa.Column("tokens_per_second", sa.Double(), nullable=True),
        sa.Column("seconds_remaining", sa.Double(), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("gpu_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("progress_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("heartbeat_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("started_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("resumed_from_step", sa.BigInteger(), nullable=True),
        sa.Column("facts", postgresql.JSONB(), nullable=True),
        sa.Column("error", postgresql.JSONB(), nullable=True),
        sa.Column("fine_tuned_model", sa.Text(), nullable=True),
        sa.Column("final_checkpoint_id", sa.BigInteger(), nullable=True),
        sa.Column("result_file_id", sa.BigInteger(), nullable=True),
        sa.Column("last_event_seq", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state = 'succeeded') = (final_checkpoint_id is not null)", name="jobs_result"
        ),
        sa.CheckConstraint(
            "(state in ('starting','running','finishing')) = (owner is not null)", name="jobs_owner"
        ),
        sa.CheckConstraint(
            "state <> 'queued' or (cancel_requested_at is null and pause_requested_at is null)",
            name="jobs_queued_is_runnable",
        ),
        sa.CheckConstraint(
            "state in ('validating','queued','starting','running','finishing','paused',"
            "'succeeded','failed','cancelled')",
            name="jobs_state",
        ),
        sa.CheckConstraint("(owner is null) = (lease_until is null)", name="jobs_lease"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.ForeignKeyConstraint(["result_file_id"], ["files.id"]),
        sa.ForeignKeyConstraint(["training_file_id"], ["files.id"]),
        sa.ForeignKeyConstraint(["validation_file_id"], ["files.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("public_id"),
    )
    op.create_index("jobs_by_project", "jobs", ["project_id", "id"])
    op.create_index(
        "jobs_open",
        "jobs",
        ["project_id"],
        postgresql_where=sa.text("state not in ('succeeded','failed','cancelled')"),
    )
    op.create_index("jobs_owned", "jobs", ["id"], postgresql_where=sa.text("owner is not null"))
    op.create_index(
        "jobs_ready",
        "jobs",
        ["queue", sa.text("priority desc"), "run_after", "id"],
        postgresql_where=sa.text("state = 'queued'"),
    )


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("mime_type", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("file_expires_after_s", sa.BigInteger(), nullable=True),
        sa.Column("file_id", sa.BigInteger(), nullable=True),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"]),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("public_id"),
    )
    op.create_index(
        "uploads_pending", "uploads", ["expires_at"], postgresql_where=sa.text("status = 'pending'")
    )


def _checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("kinds", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("manifest", postgresql.JSONB(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("final", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("corrupt_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("resume_dropped_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("deleted_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "attempt", "step"),
        sa.UniqueConstraint("public_id"),
    )


def _job_events() -> None:
    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("level", sa.Text(), server_default="info", nullable=False),
        sa.Column("type", sa.Text(), server_default="message", nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("from_state", sa.Text(), nullable=True),
        sa.Column("to_state", sa.Text(), nullable=True),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "seq"),
        sa.UniqueConstraint("public_id"),
    )


def _job_logs() -> None:
    op.create_table(
        "job_logs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "seq"),
    )


def _job_metrics() -> None:
    op.create_table(
        "job_metrics",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("job_id", "key", "step"),
    )


def _upload_parts() -> None:
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("upload_id", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("store_key", sa.Text(), nullable=False),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=NOW, nullable=False
        ),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("public_id"),
    )
    op.create_index("upload_parts_by_upload", "upload_parts", ["upload_id"])
