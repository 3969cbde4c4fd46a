"""From the error classes to HTTP, in one table, and the envelope that every failure wears.

    {"error": {"message", "type", "param", "code"}, "ext": {"hint", "problems"}}

`error` always has its four keys; `ext` is there when there is more to say. The stock client
retries 409, 429 and 5xx unless `x-should-retry: false` tells it not to, so whatever waiting
cannot mend says so.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tunery import errors
from tunery.errors import AppError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

# The nearest class of an error's ancestry decides.
TABLE: dict[type[AppError], tuple[int, str]] = {
    AppError: (500, "server_error"),
    errors.UserError: (400, "invalid_request_error"),
    errors.UnsupportedCombination: (422, "invalid_request_error"),
    errors.NotFound: (404, "invalid_request_error"),
    errors.Conflict: (409, "conflict_error"),
    errors.Mismatch: (422, "invalid_request_error"),
    errors.Gone: (410, "invalid_request_error"),
    errors.TooLarge: (413, "invalid_request_error"),
    errors.RangeNotSatisfiable: (416, "invalid_request_error"),
    errors.UnsupportedMediaType: (415, "invalid_request_error"),
    errors.Unauthenticated: (401, "authentication_error"),
    errors.PermissionDenied: (403, "permission_error"),
    errors.QuotaExceeded: (429, "quota_error"),
    errors.NotSupported: (501, "server_error"),
    errors.ResourceError: (503, "server_error"),
    errors.TransientError: (503, "server_error"),
}

# Conflicts that a moment resolves; all others are final.
PASSING = frozenset({"idempotency_in_progress", "validation_pending"})

# What Starlette and FastAPI raise by themselves: status to (type, code).
BARE: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request"),
    404: ("invalid_request_error", "unknown_url"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    416: ("invalid_request_error", "range_not_satisfiable"),
}


def envelope(
    message: str,
    *,
    type: str,
    code: str,
    param: str | None = None,
    hint: str | None = None,
    problems: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The body of a failed request."""
    more = {"hint": hint, "problems": problems}
    ext = {key: value for key, value in more.items() if value}
    error = {"message": message, "type": type, "param": param, "code": code}
    return {"error": error, "ext": ext} if ext else {"error": error}


def status_of(error: AppError) -> tuple[int, str]:
    """HTTP status and the envelope's `type`."""
    for ancestor in type(error).__mro__:
        if ancestor in TABLE:
            return TABLE[ancestor]
    raise AssertionError("AppError is in the table")


def render(error: AppError) -> JSONResponse:
    """The response that says this error."""
    status, kind = status_of(error)
    body = envelope(
        error.message,
        type=kind,
        code=error.code,
        param=error.param,
        hint=error.hint,
        problems=error.problems,
    )
    return JSONResponse(body, status, headers=_headers(status, error.code))


def _headers(status: int, code: str) -> dict[str, str]:
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status == 503 or code in PASSING:
        return {"retry-after": "1"}
    if status in (409, 429, 501):
        return {"x-should-retry": "false"}
    return {}


def crash() -> JSONResponse:
    """What a bug looks like from outside: the request id is all that leads to the trace."""
    body = envelope(
        "internal error; the x-request-id header finds it in the server's log",
        type="server_error",
        code="internal_error",
    )
    return JSONResponse(body, 500)


def install(app: FastAPI) -> None:
    """Make every way to fail wear the envelope."""
    app.add_exception_handler(AppError, _app_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _app_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AppError)
    return render(error)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code
    kind, code = BARE.get(
        status, ("server_error" if status >= 500 else "invalid_request_error", "invalid_request")
    )
    message = {
        404: f"no such URL: {request.method} {request.url.path}",
        405: f"{request.method} is not allowed on {request.url.path}",
    }.get(status, error.detail or HTTPStatus(status).phrase)
    return JSONResponse(
        envelope(message, type=kind, code=code), status, headers=dict(error.headers or {})
    )


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [_finding(found) for found in error.errors()]
    first = problems[0]
    where = f"{first['path']}: " if first["path"] else ""
    body = envelope(
        where + first["message"],
        type="invalid_request_error",
        code=first["code"],
        param=first["path"],
        problems=problems if len(problems) > 1 else None,
    )
    return JSONResponse(body, 400)


_CODES = {"missing": "missing_parameter", "json_invalid": "invalid_json"}


def _finding(found: Mapping[str, Any]) -> dict[str, Any]:
    # The first element says query, path or body; clients know their parameters without it. The
    # offending value is left out: it may be training text.
    path = ".".join(str(part) for part in found["loc"][1:])
    if found["type"] == "json_invalid":
        return {"code": "invalid_json", "path": None, "message": "the body is not valid JSON"}
    code = _CODES.get(found["type"], "invalid_value")
    return {"code": code, "path": path or None, "message": found["msg"].lower()}
