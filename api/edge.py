"""The outermost layer: request ids, body limits, and the last word on a crash. Plain ASGI."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

import structlog
from starlette.exceptions import HTTPException

from api.errors import crash, render
from tunery import __version__
from tunery.errors import InvalidConfig, TooLarge

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger()

JSON_LIMIT_BYTES = 1 << 20
# Bodies that are streamed to the store; their routes and `streamed_limit_bytes` bound them.
STREAMED = re.compile(r"/v1/(files|uploads/[^/]+/parts)/?")
FORM_OVERHEAD_BYTES = 1 << 20


class Edge:
    """Names each request, bounds its body, turns a crash into the envelope.

    Args:
        streamed_limit_bytes: what the upload routes may be sent; all others take 1 MiB.
    """

    def __init__(self, app: ASGIApp, streamed_limit_bytes: int) -> None:
        self.app = app
        self.streamed_limit_bytes = streamed_limit_bytes + FORM_OVERHEAD_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        headers = [
            (b"x-request-id", request_id.encode()),
            (b"ft-version", __version__.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        # Postgres has no text with it, so nothing of ours is called that.
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            code = "invalid_path" if "\0" in scope["path"] else "invalid_value"
            refusal = InvalidConfig("the address contains a NUL character", code=code)
            await render(refusal)(scope, receive, answer)
            return
        limit = self._limit(scope)
        if _declared_length(scope) > limit:
            await render(_too_large(limit))(scope, receive, answer)
            return
        try:
            await self.app(scope, _Bounded(receive, limit), answer)
        except Exception:  # the edge of the process: a bug must not look like a broken network
            log.exception("request.crashed", request_id=request_id, path=scope["path"])
            if started:
                raise
            await crash()(scope, receive, answer)

    def _limit(self, scope: Scope) -> int:
        streamed = scope["method"] == "POST" and STREAMED.fullmatch(scope["path"])
        return self.streamed_limit_bytes if streamed else JSON_LIMIT_BYTES


class _Bounded:
    """Counts a body whose length was not declared, or was lied about."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit
        self._limit = limit

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                # Not a TooLarge: FastAPI hides all but HTTP exceptions raised while it reads.
                raise HTTPException(413, _too_large(self._limit).message)
        return message


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request body is larger than {limit} bytes", code="request_too_large")


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
