"""Every call of the service that the clients make, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tunery.client.objects import Checkpoint, Event, File, Job, ManifestFile, Metrics
from tunery.client.wire import Call, given, once

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JOBS = "/v1/fine_tuning/jobs"
PAGE = 100


def _part(value: str) -> str:
    """One path segment: an id never opens another path."""
    return quote(value, safe="")


def job_path(job_id: str, *rest: str) -> str:
    return "/".join([JOBS, _part(job_id), *rest])


def checkpoint_path(job_id: str, checkpoint: str, *rest: str) -> str:
    return job_path(job_id, "checkpoints", _part(checkpoint), *rest)


def _as_is(value: Any) -> Any:
    return value


def _rows(value: Any) -> list[dict[str, Any]]:
    return list(value["data"])


def create_job(body: Mapping[str, Any]) -> Call[Job]:
    return Call("POST", JOBS, Job.model_validate, json=dict(body), headers=once())


def dry_run(body: Mapping[str, Any]) -> Call[dict[str, Any]]:
    return Call("POST", f"{JOBS}/dry_run", _as_is, json=dict(body), headers=once())


def get_job(job_id: str, wait_s: int = 0) -> Call[Job]:
    headers = {"prefer": f"wait={wait_s}"} if wait_s else {}
    return Call("GET", job_path(job_id), Job.model_validate, headers=headers)


def move_job(job_id: str, verb: str) -> Call[Job]:
    """`verb` is cancel, pause or resume; each does nothing the second time."""
    return Call("POST", job_path(job_id, verb), Job.model_validate, headers=once())


def list_jobs(after: str | None, filters: Mapping[str, Any]) -> Call[dict[str, Any]]:
    return Call("GET", JOBS, _as_is, params=given(after=after, limit=PAGE, **filters))


def list_events(job_id: str, after: str | None) -> Call[dict[str, Any]]:
    params = given(since_id=after, limit=PAGE, order="asc")
    return Call("GET", job_path(job_id, "events"), _as_is, params=params)


def metrics(job_id: str, keys: Sequence[str] | None, resolution: int | None) -> Call[Metrics]:
    params = given(keys=",".join(keys) if keys else None, resolution=resolution)
    return Call("GET", job_path(job_id, "metrics"), _metrics, params=params)


def _metrics(answer: Any) -> Metrics:
    """From columns: `{key: {"steps": [...], "values": [...], ...}}`."""
    return Metrics(
        points={
            key: list(zip(columns["steps"], columns["values"], strict=True))
            for key, columns in answer["data"].items()
        }
    )


def list_checkpoints(job_id: str, after: str | None) -> Call[dict[str, Any]]:
    params = given(after=after, limit=PAGE)
    return Call("GET", job_path(job_id, "checkpoints"), _as_is, params=params)


def get_checkpoint(job_id: str, checkpoint: str) -> Call[Checkpoint]:
    return Call("GET", checkpoint_path(job_id, checkpoint), Checkpoint.model_validate)


def manifest(job_id: str, checkpoint: str) -> Call[list[ManifestFile]]:
    def parse(answer: Any) -> list[ManifestFile]:
        return [ManifestFile.model_validate(row) for row in answer["data"]]

    return Call("GET", checkpoint_path(job_id, checkpoint, "files"), parse)


def checkpoint_file(job_id: str, checkpoint: str, path: str) -> str:
    """The path of one of a checkpoint's files."""
    return checkpoint_path(job_id, checkpoint, "files", *map(_part, path.split("/")))


def get_file(file_id: str) -> Call[File]:
    return Call("GET", f"/v1/files/{_part(file_id)}", File.model_validate)


def list_files(after: str | None) -> Call[dict[str, Any]]:
    return Call("GET", "/v1/files", _as_is, params=given(after=after, limit=PAGE))


def file_validation(file_id: str) -> Call[dict[str, Any] | None]:
    def parse(answer: Any) -> dict[str, Any] | None:
        found: dict[str, Any] | None = answer["validation"]
        return found

    return Call("GET", f"/v1/files/{_part(file_id)}/validation", parse)


def delete_file(file_id: str) -> Call[dict[str, Any]]:
    return Call("DELETE", f"/v1/files/{_part(file_id)}", _as_is)


def list_models() -> Call[list[dict[str, Any]]]:
    return Call("GET", "/v1/models", _rows)


def list_workers() -> Call[list[dict[str, Any]]]:
    return Call("GET", "/v1/workers", _rows)


def drain_worker(worker_id: str, wanted: bool) -> Call[dict[str, Any]]:
    verb = "drain" if wanted else "undrain"
    return Call("POST", f"/v1/workers/{_part(worker_id)}/{verb}", _as_is, headers=once())


def version() -> Call[dict[str, Any]]:
    return Call("GET", "/version", _as_is)


def event_of(data: str) -> Event:
    return Event.model_validate_json(data)
