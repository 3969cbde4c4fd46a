"""Downloads: HEAD, ranges, conditional requests, digests. RFC 9110 §13 and §14, RFC 9530.

Never compressed: who resumes a download must know its length.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from fastapi.responses import Response, StreamingResponse

from api.errors import render
from tunery.errors import RangeNotSatisfiable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from fastapi import Request
    from starlette.types import Send

    from core.artifacts.stores import ArtifactStore

_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.IGNORECASE)


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
    """The answer to a GET or HEAD of a stored artifact that never changes.

    200, 206 for one satisfiable range, 304 when the client has it, 416 beyond the end. Several
    ranges, and what is no range at all, are answered with the whole, as RFC 9110 allows.

    Args:
        sha256: of all its bytes, in hex; the `ETag`.
        filename: what the client may save it as; quoted safely, whatever it is.
    """
    etag = f'"{sha256}"'
    made = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
        "content-disposition": disposition(filename),
        "repr-digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",
        **(headers or {}),
    }
    if _has(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=made)
    span = _span(request, etag, size_bytes)
    if span == (0, 0):
        refusal = render(RangeNotSatisfiable(f"the file has {size_bytes} bytes"))
        refusal.headers["content-range"] = f"bytes */{size_bytes}"
        return refusal
    start, end = span or (0, size_bytes)
    if span is not None:
        made["content-range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    made["content-length"] = str(end - start)
    status = 200 if span is None else 206
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=made, media_type=content_type)
    return _Download(
        store.get(key, start, end), status_code=status, headers=made, media_type=content_type
    )


def disposition(filename: str) -> str:
    """`Content-Disposition: attachment` for any name at all (RFC 6266)."""
    name = re.sub(r"[\x00-\x1f\x7f]", "", filename.replace("\\", "/").rsplit("/", 1)[-1]) or "file"
    plain = re.sub(r"[^A-Za-z0-9 ._()+=@-]", "_", name)
    exact = quote(name, safe="", errors="replace")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"


def _has(given: str | None, etag: str) -> bool:
    """Whether an `If-None-Match` names this tag; weak comparison, as for GET."""
    if given is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in given.split(",")]
    return "*" in tags or etag in tags


def _span(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """The bytes asked for, `(start, end)`; None: all of them; `(0, 0)`: none that are there."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    # A resumed download of something else must begin again.
    if match is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        length = min(int(last), size)
        return (size - length, size) if length else (0, 0)
    start = int(first)
    end = min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None  # not a range by the grammar
    return (start, end) if start < size else (0, 0)


class _Download(StreamingResponse):
    """Begins when the first bytes are there, so that a store that fails is a failed request."""

    async def stream_response(self, send: Send) -> None:
        body = aiter(self.body_iterator)
        first = await anext(body, b"")

        async def whole() -> AsyncIterator[str | bytes | memoryview]:
            yield first
            async for chunk in body:
                yield chunk

        self.body_iterator = whole()
        await super().stream_response(send)
