"""Data files: uploaded once, validated on the way, never changed."""

from __future__ import annotations

import functools

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api.deps import FilesRead, FilesWrite, Parts, Service, attempt_of
from api.forms import Form, nested
from api.pagination import limit_of, order_of, page
from api.ranged import ranged
from core.db.files import FileRepository
from core.files.intake import receive
from core.files.service import (
    Description,
    Files,
    checked_expiry,
    checked_purpose,
    clean_name,
)
from core.files.view import file_object, validation_object
from core.projects.keys import Principal
from tunery.data.read import suffix_of
from tunery.errors import AppError, InvalidConfig

router = APIRouter(prefix="/v1/files", tags=["files"])

CREATE = "POST /v1/files"


def _files(parts: Service, caller: Principal) -> Files:
    return Files(parts.db, parts.store, caller.project_id)


@router.post("")
async def create(caller: FilesWrite, request: Request, parts: Parts) -> Response:
    """Upload a file: a form with `file`, `purpose` and, if wanted, `expires_after[anchor]` and
    `expires_after[seconds]`. Training files are validated; see `status` and `ext.validation`."""
    form = Form(request)
    try:
        return await _create(caller, request, parts, form)
    except AppError:
        await form.drain()
        raise


async def _create(caller: Principal, request: Request, parts: Service, form: Form) -> Response:
    filename = clean_name(await form.file("file"))
    early = form.fields.get("purpose")  # curl may send it behind the file
    suffix = suffix_of(filename)
    if early is not None:
        suffix = Description(filename, checked_purpose(early)).suffix
    files = _files(parts, caller)
    public_id, key = files.new_key()
    async with receive(
        parts.store,
        key,
        form.chunks(),
        limit_bytes=parts.settings.max_file_bytes,
        suffix=suffix,
    ) as received:
        fields = await form.rest()
        described = Description(
            filename,
            checked_purpose(fields.get("purpose")),
            checked_expiry(nested(fields, "expires_after")),
        )
        attempt = functools.partial(attempt_of, request, caller, CREATE)
        row, replayed = await files.create(public_id, received, described, attempt)
    return JSONResponse(
        file_object(row), headers={"idempotent-replayed": "true"} if replayed else None
    )


@router.get("")
async def list_files(
    caller: FilesRead,
    parts: Parts,
    after: str | None = None,
    limit: str | None = None,
    order: str | None = None,
    purpose: str | None = None,
) -> Response:
    """The project's files, newest first."""
    size = limit_of(limit, default=10_000, most=10_000)
    async with parts.db.session() as session:
        rows = await FileRepository(session, caller.project_id).list(
            after=after, limit=size + 1, order=order_of(order), purpose=purpose
        )
    if rows is None:
        raise InvalidConfig("after: the project has no such file", param="after")
    return JSONResponse(page([file_object(row) for row in rows[:size]], more=len(rows) > size))


@router.get("/{file_id}")
async def retrieve(caller: FilesRead, parts: Parts, file_id: str) -> Response:
    """One file."""
    return JSONResponse(file_object(await _files(parts, caller).get(file_id)))


@router.delete("/{file_id}")
async def delete(caller: FilesWrite, parts: Parts, file_id: str) -> Response:
    """Remove a file and its bytes; 409 while a job that is not over uses it."""
    await _files(parts, caller).delete(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


@router.get("/{file_id}/content")
@router.head("/{file_id}/content", include_in_schema=False)
async def content(caller: FilesRead, request: Request, parts: Parts, file_id: str) -> Response:
    """The bytes, whole or in ranges. The `ETag` is their sha256."""
    row = await _files(parts, caller).get(file_id)
    return ranged(
        request,
        parts.store,
        row.store_key,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        filename=row.filename,
        content_type=row.content_type,
    )


@router.get("/{file_id}/validation")
async def validation(caller: FilesRead, parts: Parts, file_id: str) -> Response:
    """What was found in a training file: up to 100 problems with line and code, and their
    counts."""
    return JSONResponse(validation_object(await _files(parts, caller).get(file_id)))
