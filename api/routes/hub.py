"""A read-only route in the shape of the Hugging Face hub: `HF_ENDPOINT=<server>/hf`.

Whatever downloads through huggingface_hub (PEFT, transformers, vLLM) can then load a job's
adapter as `<project>/<job id>`, with our key as `HF_TOKEN`. `main` is the job's result or its best
checkpoint so far, `step-<n>` one checkpoint, and each checkpoint has a 40-digit commit made from
its manifest, because the client's cache is keyed by it.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api.deps import ArtifactsRead, Parts
from api.errors import render
from api.routes.checkpoints import serve_file
from core.artifacts import exports
from core.db import checkpoints, views
from core.jobs.view import export_files
from tunery.errors import AppError, NotFound

if TYPE_CHECKING:
    from api.deps import Service
    from core.db.tables import CheckpointRow
    from core.projects.keys import Principal

router = APIRouter(prefix="/hf", tags=["hub"])

COMMIT = re.compile(r"[0-9a-f]{40}")


@router.get("/api/models/{project}/{name}")
async def model_info(caller: ArtifactsRead, parts: Parts, project: str, name: str) -> Response:
    """The repository at `main`."""
    return await _info(parts, caller, project, name, "main")


@router.get("/api/models/{project}/{name}/revision/{revision}")
async def revision_info(
    caller: ArtifactsRead, parts: Parts, project: str, name: str, revision: str
) -> Response:
    """The repository at a revision: what `snapshot_download` asks first."""
    return await _info(parts, caller, project, name, revision)


@router.get("/api/models/{project}/{name}/tree/{revision}")
async def tree(
    caller: ArtifactsRead, parts: Parts, project: str, name: str, revision: str
) -> Response:
    """Every file with its size; one page."""
    try:
        row = await _revision(parts, caller, project, name, revision)
    except AppError as error:
        return _refused(error)
    listed = [
        {
            "type": "file",
            "path": file["path"],
            "size": file["bytes"],
            "oid": file["sha256"][:40],
            "lfs": {"oid": file["sha256"], "size": file["bytes"], "pointerSize": 0},
        }
        for file in export_files(row.manifest)
    ]
    return JSONResponse(listed)


@router.get("/{project}/{name}/resolve/{revision}/{path:path}")
@router.head("/{project}/{name}/resolve/{revision}/{path:path}", include_in_schema=False)
async def resolve(
    caller: ArtifactsRead,
    request: Request,
    parts: Parts,
    project: str,
    name: str,
    revision: str,
    path: str,
) -> Response:
    """One file. A missing one still names the commit: the client caches that it is not there."""
    try:
        row = await _revision(parts, caller, project, name, revision)
    except AppError as error:
        return _refused(error)
    commit = {"x-repo-commit": commit_of(row)}
    try:
        file = exports.find_file(row.manifest, path)
    except AppError as error:
        return _refused(error, {"x-error-code": "EntryNotFound", **commit})
    return serve_file(request, parts, row.prefix, file, commit)


def commit_of(row: CheckpointRow) -> str:
    """40 hex digits that change when, and only when, the export's content does."""
    content = [[file["path"], file["sha256"]] for file in export_files(row.manifest)]
    return hashlib.sha256(json.dumps([row.public_id, content]).encode()).hexdigest()[:40]


def _refused(error: AppError, headers: dict[str, str] | None = None) -> Response:
    response = render(error)
    response.headers.update(headers or {"x-error-code": "RepoNotFound"})
    response.headers["x-error-message"] = error.message.encode("ascii", "replace").decode()
    return response


async def _info(
    parts: Service, caller: Principal, project: str, name: str, revision: str
) -> Response:
    try:
        row = await _revision(parts, caller, project, name, revision)
    except AppError as error:
        return _refused(error)
    return JSONResponse(
        {
            "id": f"{project}/{name}",
            "modelId": f"{project}/{name}",
            "author": project,
            "sha": commit_of(row),
            "private": True,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["peft"],
            "library_name": "peft",
            "createdAt": row.created_at.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "lastModified": row.created_at.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "siblings": [{"rfilename": file["path"]} for file in export_files(row.manifest)],
        }
    )


async def _revision(
    parts: Service, caller: Principal, project: str, name: str, revision: str
) -> CheckpointRow:
    """The checkpoint that a revision of `<project>/<job>` means.

    Raises:
        NotFound: no such repository, or no such revision of it.
    """
    if project not in (caller.project_name, caller.project):
        raise NotFound(
            f"there is no repository {project[:100]}/{name[:100]}", code="repo_not_found"
        )
    async with parts.db.session() as session:
        job = await views.head(session, caller.project_id, name)
        if job is None:
            raise _no_repository(project, name)
        row = await _of_revision(session, job.id, revision)
    if row is None or "export" not in row.kinds or row.corrupt_at is not None:
        raise NotFound(
            f"the repository has no revision {revision[:100]!r}", code="revision_not_found"
        )
    return row


def _no_repository(project: str, name: str) -> NotFound:
    return NotFound(f"there is no repository {project[:100]}/{name[:100]}", code="repo_not_found")


async def _of_revision(session: Any, job: int, revision: str) -> CheckpointRow | None:
    if revision == "main":
        return await views.result(session, job) or await checkpoints.get(session, job, "best")
    if not COMMIT.fullmatch(revision):
        return await checkpoints.get(session, job, revision)
    after: str | None = None
    while True:
        found = await checkpoints.list_checkpoints(
            session, job, after=after, limit=100, kind="export"
        )
        rows, more = found or ([], False)
        for row in rows:
            if commit_of(row) == revision:
                return row
        if not more:
            return None
        after = rows[-1].public_id
