"""Checkpoints and what can be taken out of them: manifests, files, archives, the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from api.deps import ArtifactsRead, Body, JobsRead, JobsWrite, Parts
from api.pagination import limit_of, order_of, page
from api.ranged import ranged
from api.routes.jobs import no_job
from core.artifacts import exports
from core.db import checkpoints, views
from core.db.jobs import JobRepository
from core.jobs.view import checkpoint_object, export_files, job_object
from tunery.errors import Conflict, InvalidConfig, NotFound

if TYPE_CHECKING:
    from api.deps import Service
    from core.db.tables import CheckpointRow
    from core.projects.keys import Principal

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["artifacts"])


@router.get("/checkpoints")
async def list_checkpoints(
    caller: JobsRead,
    parts: Parts,
    job_id: str,
    after: str | None = None,
    limit: str | None = None,
    order: str | None = None,
) -> Response:
    """A job's checkpoints, newest first."""
    size = limit_of(limit, default=10, most=100)
    async with parts.db.session() as session:
        job = await _job(session, caller, job_id)
        found = await checkpoints.list_checkpoints(
            session, job, after=after, limit=size, order=order_of(order)
        )
        best = await checkpoints.get(session, job, "best")
    if found is None:
        raise InvalidConfig("after: the job has no such checkpoint", param="after")
    rows, more = found
    best_id = best.id if best else None
    shown = [checkpoint_object(row, job_id, best=row.id == best_id) for row in rows]
    return JSONResponse(page(shown, more=more))


@router.post("/checkpoints")
async def save_now(caller: JobsWrite, parts: Parts, job_id: str, body: Body) -> Response:
    """Have the running job write a checkpoint at its next step; 202 with the job."""
    if body not in (None, {}):
        raise InvalidConfig("saving now takes no settings", code="unknown_parameter")
    async with parts.db.begin() as session:
        found = await JobRepository(session, caller.project_id).request_checkpoint(job_id)
        view = await views.job(session, caller.project_id, job_id) if found else None
    if view is None:
        raise no_job(job_id)
    return JSONResponse(job_object(view, caller.project), 202)


@router.get("/checkpoints/{which}")
async def retrieve(caller: JobsRead, parts: Parts, job_id: str, which: str) -> Response:
    """One checkpoint, by id or as `latest`, `best` or `step-<n>`."""
    async with parts.db.session() as session:
        job = await _job(session, caller, job_id)
        row = await _checkpoint(session, job, which)
        best = await checkpoints.get(session, job, "best")
    is_best = best is not None and best.id == row.id
    return JSONResponse(checkpoint_object(row, job_id, best=is_best))


@router.get("/checkpoints/{which}/files")
async def manifest(caller: ArtifactsRead, parts: Parts, job_id: str, which: str) -> Response:
    """The files of a checkpoint's export: path, bytes, sha256 and role of each."""
    row = await _export(parts, caller, job_id, which)
    return JSONResponse(
        {
            "object": "list",
            "checkpoint_id": row.public_id,
            "data": export_files(row.manifest),
            "has_more": False,
        }
    )


@router.get("/checkpoints/{which}/files/{path:path}")
@router.head("/checkpoints/{which}/files/{path:path}", include_in_schema=False)
async def download(
    caller: ArtifactsRead, request: Request, parts: Parts, job_id: str, which: str, path: str
) -> Response:
    """One file, whole or in ranges. Its `ETag` is its sha256."""
    row = await _export(parts, caller, job_id, which)
    file = exports.find_file(row.manifest, path)
    return serve_file(request, parts, row.prefix, file)


@router.get("/checkpoints/{which}/archive")
async def archive(
    caller: ArtifactsRead, parts: Parts, job_id: str, which: str, format: str = "tar"
) -> Response:
    """All files of the export as one `tar`, or `format=tar.gz`; the same bytes each time."""
    row = await _export(parts, caller, job_id, which)
    return _archive(parts, row, job_id, format)


@router.get("/adapter")
async def adapter(
    caller: ArtifactsRead, parts: Parts, job_id: str, format: str = "tar"
) -> Response:
    """The job's result as an archive: its final export or, before that, its best so far."""
    async with parts.db.session() as session:
        job = await _job(session, caller, job_id)
        row = await views.result(session, job) or await checkpoints.get(session, job, "best")
    if row is None:
        raise Conflict(
            "the job has no export yet",
            code="not_ready",
            hint="the first comes with its first checkpoint",
        )
    return _archive(parts, row, job_id, format)


def serve_file(
    request: Request,
    parts: Service,
    prefix: str,
    file: dict[str, Any],
    headers: dict[str, str] | None = None,
) -> Response:
    """One file of an export, by its manifest entry."""
    return ranged(
        request,
        parts.store,
        exports.store_key(prefix, file["path"]),
        size_bytes=file["bytes"],
        sha256=file["sha256"],
        filename=file["path"].rsplit("/", 1)[-1],
        content_type=_content_type(file["path"]),
        headers=headers or {},
    )


def _content_type(path: str) -> str:
    return "application/json" if path.endswith(".json") else "application/octet-stream"


def _archive(parts: Service, row: CheckpointRow, job_id: str, format: str) -> Response:
    if format not in ("tar", "tar.gz"):
        raise InvalidConfig("format: tar or tar.gz is expected", param="format")
    files = export_files(row.manifest)
    chunks = exports.tar(parts.store, row.prefix, files)
    name = f"{job_id}-step-{row.step}.{format}"
    headers = {"content-disposition": f'attachment; filename="{name}"', "accept-ranges": "none"}
    if format == "tar":
        headers["content-length"] = str(exports.tar_size(files))
        return StreamingResponse(chunks, media_type="application/x-tar", headers=headers)
    return StreamingResponse(
        exports.gzipped(chunks), media_type="application/gzip", headers=headers
    )


async def _job(session: Any, caller: Principal, job_id: str) -> int:
    found = await views.head(session, caller.project_id, job_id)
    if found is None:
        raise no_job(job_id)
    return found.id


async def _checkpoint(session: Any, job: int, which: str) -> CheckpointRow:
    row = await checkpoints.get(session, job, which)
    if row is None:
        raise NotFound(f"the job has no checkpoint {which[:100]!r}", code="checkpoint_not_found")
    return row


async def _export(parts: Service, caller: Principal, job_id: str, which: str) -> CheckpointRow:
    """A checkpoint with something to take out.

    Raises:
        NotFound: no such job or checkpoint, or one that only the service can use.
    """
    async with parts.db.session() as session:
        row = await _checkpoint(session, await _job(session, caller, job_id), which)
    if "export" not in row.kinds or row.corrupt_at is not None:
        raise NotFound(
            f"checkpoint {row.public_id} has no files to hand out", code="checkpoint_not_found"
        )
    return row
