"""How jobs, events and checkpoints look from outside: OpenAI's objects, with ours under `ext`.

Pure functions from rows to plain JSON. Nothing is left out when it is unknown: it is null, and an
error that is not there is null too, never an empty object.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from core.jobs.state import OWNED, STATUS, TERMINAL, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from core.db.tables import CheckpointRow, JobEventRow
    from core.db.views import JobView

RUNNING_PHASES: Final = frozenset({"preparing", "training", "evaluating", "saving", "uploading"})
CHECKPOINT_METRICS: Final = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
EXPORT: Final = "export/"


def job_object(view: JobView, organization: str, now: datetime | None = None) -> dict[str, Any]:
    """A `fine_tuning.job`. `now` is given by tests."""
    now = now or datetime.now(UTC)
    return {
        "id": view.public_id,
        "object": "fine_tuning.job",
        "created_at": unix(view.created_at),
        "model": view.model,
        "organization_id": organization,
        "status": STATUS[State(view.state)],
        "training_file": view.training_file,
        "validation_file": view.validation_file,
        "result_files": [view.result_file] if view.result_file else [],
        "seed": view.seed,
        "fine_tuned_model": view.fine_tuned_model,
        "finished_at": unix_or_none(view.finished_at),
        "estimated_finish": _estimated_finish(view),
        "trained_tokens": view.trained_tokens,
        "hyperparameters": _openai_hyperparameters(view),
        "method": _method(view),
        "error": _error(view),
        "integrations": view.integrations,
        "metadata": view.metadata,
        "user_provided_suffix": view.suffix,
        "ext": {
            "phase": phase(view, now),
            "progress": _progress(view),
            "queue": _queue(view, now),
            "attempt": _attempt(view),
            "resolved": {"spec": view.spec, **view.resolved, "facts": view.facts},
            "usage": {
                "gpu_seconds": round(view.gpu_seconds, 3),
                "trained_tokens": view.trained_tokens,
                "peak_memory_bytes": view.peak_memory_bytes,
            },
            "artifacts": {
                "final_checkpoint": view.final_checkpoint,
                "best_checkpoint": view.best_checkpoint,
                "metrics_file": view.result_file,
            },
            "failure": _failure(view),
            "lineage": _lineage(view),
            "priority": view.priority,
        },
    }


def unix(at: datetime) -> int:
    return int(at.timestamp())


def unix_or_none(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())


def phase(view: JobView, now: datetime) -> str:
    """The finer state, for people."""
    if view.state in TERMINAL:
        return "done"
    if view.state in OWNED:
        if view.cancel_requested_at is not None:
            return "cancelling"
        if view.pause_requested_at is not None:
            return "pausing"
        if view.state == "finishing":
            return "uploading"
        if view.phase in RUNNING_PHASES:
            return view.phase
        return "preparing" if view.state == "starting" else "training"
    if view.state == "queued":
        if view.hold:
            return "validated"
        return "backing_off" if view.run_after > now else "waiting_for_capacity"
    return view.state


def _estimated_finish(view: JobView) -> int | None:
    if view.state not in OWNED or view.seconds_remaining is None or view.progress_at is None:
        return None
    return int(view.progress_at.timestamp() + view.seconds_remaining)


def _openai_hyperparameters(view: JobView) -> dict[str, Any]:
    shown = view.resolved.get("hyperparameters") or {}
    return {key: _whole(value) for key, value in shown.items()}


def _method(view: JobView) -> dict[str, Any]:
    spec = view.spec
    settings = {**_openai_hyperparameters(view), **spec["method"]["config"]}
    adapter = {"type": spec["adapter"]["type"], **spec["adapter"]["config"]}
    return {
        "type": view.method,
        view.method: {
            "hyperparameters": {key: _whole(value) for key, value in settings.items()},
            "adapter": adapter,
        },
    }


def _whole(value: Any) -> Any:
    """3.0 as 3: the stock clients' types have integers where we allow fractions."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _error(view: JobView) -> dict[str, Any] | None:
    if view.state != "failed":
        return None
    error = view.error or {}
    return {
        "code": error.get("code", "internal_error"),
        "message": error.get("message", ""),
        "param": error.get("param"),
    }


def _failure(view: JobView) -> dict[str, Any] | None:
    """Of the last failed attempt, also while another one is tried."""
    if not view.error:
        return None
    error = view.error
    return {
        "category": error.get("category", "unknown"),
        "code": error.get("code", "internal_error"),
        "retriable": bool(error.get("retriable", False)),
        "hint": error.get("hint"),
    }


def _progress(view: JobView) -> dict[str, Any]:
    total = view.total_steps
    estimated = view.state in OWNED and view.seconds_remaining is not None
    return {
        "step": view.last_step,
        "total_steps": total,
        "epoch": view.epoch,
        "percent": round(100 * view.last_step / total, 2) if total else None,
        "tokens_per_second": view.tokens_per_second,
        "seconds_remaining": view.seconds_remaining if estimated else None,
        "estimate_available": estimated,
        "last_progress_at": unix_or_none(view.progress_at),
    }


def _queue(view: JobView, now: datetime) -> dict[str, Any] | None:
    if view.state != "queued":
        return None
    if view.hold:
        reason = "manual"
    elif view.run_after > now:
        reason = "backoff"
    else:
        reason = "capacity"
    return {
        "name": view.queue,
        "position": view.position,
        "reason": reason,
        "estimated_start": unix(view.run_after) if reason == "backoff" else None,
    }


def _attempt(view: JobView) -> dict[str, Any]:
    return {
        "number": view.attempt,
        "max": view.max_errors + 1,
        "worker_id": view.worker,
        "started_at": unix_or_none(view.started_at),
        "heartbeat_at": unix_or_none(view.heartbeat_at),
        "resumed_from_step": view.resumed_from_step,
    }


def _lineage(view: JobView) -> dict[str, Any]:
    start = view.spec.get("init_from") or {}
    return {"initial_checkpoint": start.get("checkpoint")}


def event_object(row: JobEventRow) -> dict[str, Any]:
    """A `fine_tuning.job.event`."""
    return {
        "id": row.public_id,
        "object": "fine_tuning.job.event",
        "created_at": unix(row.created_at),
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": {"kind": row.kind, **row.data},
        "ext": {
            "seq": row.seq,
            "attempt": row.attempt,
            "from_status": STATUS[State(row.from_state)] if row.from_state else None,
            "to_status": STATUS[State(row.to_state)] if row.to_state else None,
        },
    }


def checkpoint_object(row: CheckpointRow, job: str, *, best: bool) -> dict[str, Any]:
    """A `fine_tuning.job.checkpoint`; `metrics` has those of OpenAI's members that were logged."""
    files = export_files(row.manifest) if row.deleted_at is None else []
    kinds = [kind for kind in row.kinds if not (kind == "resume" and row.resume_dropped_at)]
    adapter = next((file for file in files if file["path"].endswith(".safetensors")), None)
    known = {key: row.metrics[key] for key in CHECKPOINT_METRICS if key in row.metrics}
    return {
        "id": row.public_id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": unix(row.created_at),
        "fine_tuning_job_id": job,
        "fine_tuned_model_checkpoint": row.name,
        "step_number": row.step,
        "metrics": {"step": row.step, **known},
        "ext": {
            "kinds": kinds,
            "bytes": sum(file["bytes"] for file in files),
            "files": len(files),
            "expires_at": None,
            "is_best": best,
            "is_final": row.final,
            "adapter_sha256": adapter["sha256"] if adapter else None,
            "metrics": row.metrics,
        },
    }


def export_files(manifest: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The part of a manifest that its owner may have, paths as the adapter's folder has them.

    Resume checkpoints hold pickles and our bookkeeping; they never leave the service.
    """
    return sorted(
        (
            {
                "path": entry["path"].removeprefix(EXPORT),
                "bytes": entry["bytes"],
                "sha256": entry["sha256"],
                "role": entry["role"],
            }
            for entry in manifest
            if entry["path"].startswith(EXPORT)
        ),
        key=lambda file: str(file["path"]),
    )
