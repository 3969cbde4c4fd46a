"""Files and uploads as OpenAI's clients know them, with what we add under `ext`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

    from core.db.tables import FileRow, UploadPartRow, UploadRow


def _unix(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())


def file_object(row: FileRow) -> dict[str, Any]:
    """`ext.validation` says whether the file is sound and counts what was found; the findings
    themselves are at `/v1/files/{id}/validation`."""
    return {
        "id": row.public_id,
        "object": "file",
        "bytes": row.size_bytes,
        "created_at": _unix(row.created_at),
        "expires_at": _unix(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "status_details": row.status_details,
        "ext": {
            "sha256": row.sha256,
            "format": row.format,
            "rows": row.rows,
            "labels": row.labels,
            "validation": _summary(row.validation),
        },
    }


def _summary(validation: dict[str, Any] | None) -> dict[str, Any] | None:
    if validation is None:
        return None
    shown = ("valid", "problem_counts", "features")
    return {key: validation[key] for key in shown}


def validation_object(row: FileRow) -> dict[str, Any]:
    """The whole report; `null` where the purpose asks for none."""
    return {
        "object": "file.validation",
        "file_id": row.public_id,
        "status": row.status,
        "validation": row.validation,
    }


def upload_object(row: UploadRow, file: FileRow | None = None) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "upload",
        "bytes": row.size_bytes,
        "created_at": _unix(row.created_at),
        "expires_at": _unix(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "file": None if file is None else file_object(file),
    }


def part_object(row: UploadPartRow, upload_id: str) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "upload.part",
        "created_at": _unix(row.created_at),
        "upload_id": upload_id,
        "ext": {"sha256": row.sha256, "bytes": row.size_bytes},
    }
