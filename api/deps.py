"""What routes are handed: who is calling, and the service's parts.

Every route names the scope it needs (`caller: JobsRead`), or says that it needs none (`Public`);
a test walks the router and refuses a route that does neither.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from core.artifacts.stores import ArtifactStore
from core.broker import Broker
from core.db import idempotency
from core.db.engine import Database
from core.jobs.reading import JobReader
from core.jobs.submission import Submitter
from core.projects.keys import KeyRing, Principal, Scope
from core.settings import Settings
from tunery.errors import InvalidConfig, PermissionDenied, Unauthenticated
from tunery.models import ModelStore

DEPTH_LIMIT = 64
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # as json.dumps writes it, not an escaped backslash


class Bell:
    """Sets an event soon after it is rung, and then not again for a while.

    A single submission is heard almost at once; of a burst of them, a relay every `pause_s`.

    Attributes:
        heard: who waits for the bell waits for this, and clears it.
    """

    def __init__(self, soon_s: float = 0.02, pause_s: float = 0.25) -> None:
        self.heard = asyncio.Event()
        self._soon_s, self._pause_s = soon_s, pause_s
        self._rung = False
        self._not_before = float("-inf")

    def ring(self) -> None:
        if self._rung:
            return
        self._rung = True
        loop = asyncio.get_running_loop()
        loop.call_at(max(loop.time() + self._soon_s, self._not_before), self._strike)

    def _strike(self) -> None:
        self._rung = False
        self._not_before = asyncio.get_running_loop().time() + self._pause_s
        self.heard.set()


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one API process, made by the lifespan of `api.app`."""

    settings: Settings
    db: Database
    store: ArtifactStore
    broker: Broker
    keys: KeyRing
    models: ModelStore
    submitter: Submitter
    reader: JobReader
    bell: Bell
    """Rung after a commit that leaves work for the reconciler."""
    stopping: asyncio.Event
    """Set when the process is told to stop: streams end."""


async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def settings_of(request: Request) -> Settings:
    return (await service_of(request)).settings


async def store_of(request: Request) -> ArtifactStore:
    return (await service_of(request)).store


async def database_of(request: Request) -> Database:
    return (await service_of(request)).db


Parts = Annotated[Service, Depends(service_of)]
Settings_ = Annotated[Settings, Depends(settings_of)]
Store = Annotated[ArtifactStore, Depends(store_of)]
Db = Annotated[Database, Depends(database_of)]


class Scoped:
    """Lets a caller through whose key has the scope; `admin` has them all."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Principal:
        headers = request.headers
        caller = await request.app.state.service.keys.authenticate(
            _bearer(headers.get("authorization"))
        )
        for header in ("openai-project", "openai-organization"):
            if (named := headers.get(header)) and named != caller.project:
                raise PermissionDenied(
                    f"the key does not belong to what the {header} header names",
                    code="project_mismatch",
                )
        if not caller.may(self.scope):
            raise PermissionDenied(
                f"this needs the scope {self.scope}", hint="use a key that was created with it"
            )
        assert isinstance(caller, Principal)
        return caller


def _bearer(header: str | None) -> str:
    if header is None:
        raise Unauthenticated(
            "no API key was given", hint="send it as `Authorization: Bearer ft_...`"
        )
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the Authorization header must be `Bearer <key>`")
    return token.strip()


class Open:
    """Marks a route that anybody may call."""

    async def __call__(self) -> None:
        return None


def require(scope: Scope) -> Scoped:
    """For `Depends`: `caller: Annotated[Principal, Depends(require("jobs:read"))]`."""
    return Scoped(scope)


Public = Depends(Open())
FilesRead = Annotated[Principal, Depends(require("files:read"))]
FilesWrite = Annotated[Principal, Depends(require("files:write"))]
JobsRead = Annotated[Principal, Depends(require("jobs:read"))]
JobsWrite = Annotated[Principal, Depends(require("jobs:write"))]
ArtifactsRead = Annotated[Principal, Depends(require("artifacts:read"))]
LogsRead = Annotated[Principal, Depends(require("logs:read"))]
Admin = Annotated[Principal, Depends(require("admin"))]


async def json_body(request: Request) -> Any:
    """The body as plain JSON; an empty one is None, whatever its content type says.

    Raises:
        InvalidConfig: not JSON, or JSON that Postgres does not keep: NUL characters, halves of
            surrogate pairs, numbers beyond a double, lists in lists without end. The text is not
            quoted: it may be training text.
    """
    raw = await request.body()
    if not raw:
        return None
    try:
        body = json.loads(raw, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        raise InvalidConfig("the body is not valid JSON", code="invalid_json") from None
    if raw.count(b"[") + raw.count(b"{") > DEPTH_LIMIT:
        _check_depth(body)
    # Only an escape can bring what UTF-8 does not: NUL stands for itself in no JSON text.
    if b"\\u" in raw:
        _check_text(json.dumps(body, ensure_ascii=False))
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _check_depth(body: Any) -> None:
    level = [body]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for value in level
            if isinstance(value, list | dict)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise InvalidConfig(
        f"the body is nested more than {DEPTH_LIMIT} levels deep", code="invalid_json"
    )


def _check_text(dumped: str) -> None:
    try:
        dumped.encode()
    except UnicodeEncodeError:
        raise InvalidConfig("the body has half of a surrogate pair", code="invalid_json") from None
    if _NUL.search(dumped):
        raise InvalidConfig("the body has a NUL character", code="invalid_json")


Body = Annotated[Any, Depends(json_body)]


def attempt_of(request: Request, caller: Principal, route: str, body: Any) -> idempotency.Attempt:
    """Which create this is a try of, by the headers that clients send.

    Raises:
        InvalidConfig: an idempotency key that is empty, too long or not printable.
    """
    headers = request.headers
    key = headers.get("idempotency-key", headers.get("x-idempotency-key"))
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidConfig(
            "Idempotency-Key: 1 to 255 printable characters are expected", param="Idempotency-Key"
        )
    retries = headers.get("x-stainless-retry-count", "0")
    return idempotency.Attempt.of(
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        route=route,
        key=key,
        retries=int(retries) if retries.isdecimal() and len(retries) < 6 else 0,
        body=body,
    )
