"""Uploads in parts, for files too large for one request."""

from __future__ import annotations

import functools
import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api.deps import Body, FilesWrite, Parts, Service, attempt_of
from api.forms import Form
from core.files.service import Description, checked_expiry, checked_purpose, clean_name
from core.files.uploads import PARTS_LIMIT, Checks, Uploads
from core.files.view import part_object, upload_object
from core.projects.keys import Principal
from tunery.errors import AppError, InvalidConfig

router = APIRouter(prefix="/v1/uploads", tags=["files"])

CREATE = "POST /v1/uploads"


def _uploads(parts: Service, caller: Principal) -> Uploads:
    return Uploads(parts.db, parts.store, caller.project_id, parts.settings.max_file_bytes)


@router.post("")
async def create(caller: FilesWrite, request: Request, parts: Parts, body: Body) -> Response:
    """Announce a file: `bytes`, `filename`, `mime_type`, `purpose`, `expires_after`."""
    given = _object(body)
    described = Description(
        clean_name(_string(given, "filename")),
        checked_purpose(given.get("purpose")),
        checked_expiry(_expiry(given)),
    )
    upload, replayed = await _uploads(parts, caller).create(
        described,
        size_bytes=_size(given),
        mime_type=_string(given, "mime_type"),
        attempt=functools.partial(attempt_of, request, caller, CREATE),
        body=given,
    )
    return JSONResponse(
        upload_object(upload.row, upload.file),
        headers={"idempotent-replayed": "true"} if replayed else None,
    )


@router.post("/{upload_id}/parts")
async def add_part(caller: FilesWrite, request: Request, parts: Parts, upload_id: str) -> Response:
    """Send a part, at most 64 MiB, as the form's file `data`; in any order, several at once."""
    uploads = _uploads(parts, caller)
    await uploads.pending(upload_id)
    form = Form(request)
    try:
        await form.file("data")
        row = await uploads.add_part(upload_id, form.chunks())
    except AppError:
        await form.drain()
        raise
    return JSONResponse(part_object(row, upload_id))


@router.post("/{upload_id}/complete")
async def complete(caller: FilesWrite, parts: Parts, upload_id: str, body: Body) -> Response:
    """Put the parts together in the order of `part_ids`; `md5` and `ext.sha256` are checked."""
    uploads = _uploads(parts, caller)
    given = _object(body)
    ext = given.get("ext") or {}
    if not isinstance(ext, dict):
        raise InvalidConfig("ext: an object is expected", param="ext")
    checks = Checks(_hex(given, "md5", "md5", 32), _hex(ext, "sha256", "ext.sha256", 64))
    part_ids = given.get("part_ids")
    if part_ids is None:
        await uploads.pending(upload_id)
        raise InvalidConfig(
            "part_ids: this field is required", code="missing_parameter", param="part_ids"
        )
    if (
        not isinstance(part_ids, list)
        or len(part_ids) > PARTS_LIMIT
        or not all(isinstance(part, str) for part in part_ids)
    ):
        raise InvalidConfig(
            f"part_ids: a list of up to {PARTS_LIMIT} ids is expected", param="part_ids"
        )
    upload = await uploads.complete(upload_id, part_ids, checks)
    return JSONResponse(upload_object(upload.row, upload.file))


@router.post("/{upload_id}/cancel")
async def cancel(caller: FilesWrite, parts: Parts, upload_id: str) -> Response:
    """Give an upload up and remove its parts."""
    upload = await _uploads(parts, caller).cancel(upload_id)
    return JSONResponse(upload_object(upload.row, upload.file))


def _object(body: Any) -> dict[str, Any]:
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise InvalidConfig("the body must be a JSON object")
    return body


def _string(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if value is None:
        raise InvalidConfig(f"{name}: this field is required", code="missing_parameter", param=name)
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 1024:
        raise InvalidConfig(f"{name}: a short string is expected", param=name)
    return value


def _size(given: dict[str, Any]) -> int:
    value = given.get("bytes")
    if value is None:
        raise InvalidConfig(
            "bytes: this field is required", code="missing_parameter", param="bytes"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidConfig("bytes: a whole number is expected", param="bytes")
    return value


def _expiry(given: dict[str, Any]) -> dict[str, Any] | None:
    value = given.get("expires_after")
    if value is not None and not isinstance(value, dict):
        raise InvalidConfig("expires_after: an object is expected", param="expires_after")
    return value


def _hex(given: dict[str, Any], name: str, param: str, length: int) -> str | None:
    value = given.get(name)
    if value is not None and not (
        isinstance(value, str) and re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", value)
    ):
        raise InvalidConfig(f"{param}: {length} hexadecimal digits are expected", param=param)
    return value
