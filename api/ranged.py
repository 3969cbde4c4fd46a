"""Bytes out of the store over HTTP: whole or one range, `HEAD`, and a strong `ETag`.

The `ETag` is the content's sha256, which never changes under a key, so a download that broke can
be continued from any server. Nothing is ever compressed on the way: clients count on the length.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from fastapi.responses import Response, StreamingResponse

from tunery.errors import RangeNotSatisfiable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

    from core.artifacts.stores import ArtifactStore

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def ranged(
    request: Request,
    store: ArtifactStore,
    key: str,
    *,
    size_bytes: int,
    sha256: str,
    filename: str,
    content_type: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response to a GET or HEAD of one stored object.

    Several ranges at once are answered with the whole, as RFC 9110 allows.

    Args:
        sha256: of the whole object, in hex.
        filename: what a browser should save it as.

    Raises:
        RangeNotSatisfiable: the range begins behind the end.
    """
    etag = f'"{sha256}"'
    told = {
        "accept-ranges": "bytes",
        "etag": etag,
        "repr-digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        **(headers or {}),
    }
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=told)
    span = _span(request, etag, size_bytes)
    start, end = span or (0, size_bytes)
    told["content-length"] = str(end - start)
    if span is not None:
        told["content-range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=told, media_type=content_type)
    return StreamingResponse(
        store.get(key, start, end), status_code=status, headers=told, media_type=content_type
    )


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    named = [part.strip().removeprefix("W/") for part in header.split(",")]
    return "*" in named or etag in named


def _span(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last; None: the whole."""
    header = request.headers.get("range")
    if header is None or request.headers.get("if-range", etag) != etag:
        return None
    match = _RANGE.fullmatch(header.strip())
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(0, size - int(match[2])), size
    else:
        start = int(match[1])
        end = size if match[2] == "" else min(size, int(match[2]) + 1)
        if match[2] != "" and int(match[2]) < start:
            return None
    if start >= size or start >= end:
        raise RangeNotSatisfiable(f"the object has {size} bytes", param="range")
    return start, end
