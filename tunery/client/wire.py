"""What the sync and the async client share: calls as data, errors, retries. No I/O here."""

from __future__ import annotations

import math
import random
import uuid
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from tunery import __version__, errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import httpx2

T = TypeVar("T")

ATTEMPTS = 3
FIRST_BACKOFF_S = 0.5
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 90.0
"""Longer than the longest that the service holds a request on purpose (60 s)."""

_CLASSES: dict[int, type[errors.AppError]] = {
    400: errors.InvalidConfig,
    401: errors.Unauthenticated,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    409: errors.Conflict,
    410: errors.Gone,
    413: errors.TooLarge,
    415: errors.UnsupportedMediaType,
    422: errors.UnsupportedCombination,
    429: errors.QuotaExceeded,
    501: errors.NotSupported,
    502: errors.ServiceUnavailable,
    503: errors.ServiceUnavailable,
    504: errors.ServiceUnavailable,
}
_PASSING = {"rate_limited", "idempotency_in_progress", "validation_pending"}


class WaitTimeout(errors.AppError):
    """A job was not done when the caller's patience was; it goes on."""

    default_code = "wait_timeout"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and what its JSON answer becomes."""

    method: str
    path: str
    parse: Callable[[Any], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice does what sending it once does."""
        return self.method != "POST" or "idempotency-key" in self.headers


def once() -> dict[str, str]:
    """The header that makes a create safe to repeat."""
    return {"idempotency-key": str(uuid.uuid4())}


def given(**params: Any) -> dict[str, Any]:
    """Query parameters without those that are None."""
    return {key: value for key, value in params.items() if value is not None}


def headers(api_key: str) -> dict[str, str]:
    """What every request carries."""
    return {"authorization": f"Bearer {api_key}", "user-agent": f"tunery/{__version__}"}


def root_of(base_url: str) -> str:
    """The service's address without a trailing `/v1`, which stock clients want and we add."""
    return base_url.rstrip("/").removesuffix("/v1")


def is_loopback(base_url: str) -> bool:
    """Whether the service is on this machine: then no proxy of the environment lies between."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def error_from(status: int, body: Any) -> errors.AppError:
    """The error that the service raised, as the class it was raised as, as far as status tells."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        cls = _CLASSES.get(status, errors.AppError)
        return cls(f"the service answered {status}, and not in its own words")
    more = body.get("ext") or {}
    code = error.get("code")
    passing = code in _PASSING
    cls = errors.ServiceUnavailable if passing else _CLASSES.get(status, errors.AppError)
    return cls(
        error.get("message") or f"the service answered {status}",
        code,
        more.get("hint"),
        error.get("param"),
        more.get("problems"),
    )


def unreachable(base_url: str, cause: Exception) -> errors.ServiceUnavailable:
    """No answer at all."""
    return errors.ServiceUnavailable(
        f"no answer from {base_url} ({type(cause).__name__})",
        "connection_failed",
        "start it with `tunery up`, or name another service with TUNERY_BASE_URL or `tunery login`",
    )


def checked(response: httpx2.Response) -> httpx2.Response:
    """The response, if it says that all went well; a refusal's body must have been read.

    Raises:
        AppError: what the service raised.
    """
    if response.is_success:
        return response
    try:
        body = response.json()
    except ValueError:
        body = None
    raise error_from(response.status_code, body)


def pause_before(attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt`, spread so that clients part ways."""
    return math.ldexp(FIRST_BACKOFF_S, attempt - 1) * random.uniform(0.75, 1.25)
