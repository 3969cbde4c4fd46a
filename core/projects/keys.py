"""API keys: `ft_<id>_<secret><crc>`.

The id finds the row, the SHA-256 of the secret proves it (256 random bits need no slow hash), and
the checksum turns typing errors away without a query. Only the hash is stored. An unknown key and
a wrong one are answered alike, after the same work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import secrets
import string
import time
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, get_args

import structlog

from core.db import projects as table
from core.ids import new_id
from tunery.errors import InvalidConfig, TransientError, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.db.engine import Database
    from core.db.tables import ApiKeyRow, ProjectRow

log = structlog.get_logger()

Scope = Literal[
    "files:read", "files:write", "jobs:read", "jobs:write", "artifacts:read", "logs:read", "admin"
]
SCOPES: tuple[Scope, ...] = get_args(Scope)
USER_SCOPES: tuple[Scope, ...] = tuple(scope for scope in SCOPES if scope != "admin")

CACHE_S = 20.0
"""How long a key that was good is believed: with a margin, a revocation works within 30 s."""
CACHE_SIZE = 4096
USAGE_S = 15.0

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_LENGTH = 43  # 62**43 > 2**256
_CRC_LENGTH = 6  # 62**6 > 2**32
_FORM = re.compile(rf"ft_([0-9A-Za-z]{{8,64}})_([0-9A-Za-z]{{{_SECRET_LENGTH + _CRC_LENGTH}}})")
_REFUSAL = "this API key is not valid: unknown, mistyped, revoked or expired"
_NOBODY = hashlib.sha256(b"no such key").digest()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a key, the project that it belongs to, and what it may do."""

    project_id: int
    project: str
    project_name: str
    max_queued_jobs: int | None
    key_id: int
    key: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


def compose(key_id: str, secret: str) -> str:
    """The key as its owner sees it, once."""
    body = f"ft_{key_id.removeprefix('key_')}_{secret}"
    return body + _checksum(body)


def split(token: str) -> tuple[str, str] | None:
    """The row's id and the secret; None when this cannot be one of our keys."""
    match = _FORM.fullmatch(token)
    if match is None or _checksum(token[:-_CRC_LENGTH]) != token[-_CRC_LENGTH:]:
        return None
    return f"key_{match[1]}", match[2][:_SECRET_LENGTH]


def _checksum(body: str) -> str:
    value, digits = zlib.crc32(body.encode()), ""
    for _ in range(_CRC_LENGTH):
        value, digit = divmod(value, 62)
        digits += _BASE62[digit]
    return digits


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


async def create_key(
    db: Database,
    project: ProjectRow,
    *,
    name: str,
    scopes: Sequence[str] = USER_SCOPES,
    lifetime: timedelta | None = None,
) -> tuple[ApiKeyRow, str]:
    """A new key of a project, and the text that is shown once.

    Raises:
        InvalidConfig: a scope that does not exist.
    """
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise InvalidConfig(
            f"scopes: there is no scope {unknown[0]!r}",
            hint=f"known: {', '.join(SCOPES)}",
            param="scopes",
        )
    public_id = new_id("key_")
    secret = "".join(secrets.choice(_BASE62) for _ in range(_SECRET_LENGTH))
    expires_at = None if lifetime is None else datetime.now(UTC) + lifetime
    async with db.begin() as session:
        row = await table.insert_key(
            session,
            public_id=public_id,
            project_id=project.id,
            name=name,
            secret_sha256=_hash(secret),
            scopes=[scope for scope in SCOPES if scope in scopes],
            expires_at=expires_at,
        )
    return row, compose(public_id, secret)


class KeyRing:
    """Authenticates, and remembers for `cache_s` whom it knows. One per process."""

    def __init__(self, db: Database, *, cache_s: float = CACHE_S) -> None:
        self._db = db
        self._cache_s = cache_s
        self._known: dict[bytes, tuple[Principal, float]] = {}
        self._used: set[int] = set()

    async def authenticate(self, token: str) -> Principal:
        """The key's principal.

        Raises:
            Unauthenticated: not a good key; the same words for every cause.
        """
        fingerprint = _hash(token)
        found = self._known.get(fingerprint)
        if found is not None and found[1] > time.monotonic():
            self._used.add(found[0].key_id)
            return found[0]
        principal, good_for_s = await self._look_up(token)
        if len(self._known) >= CACHE_SIZE:
            self._known.clear()
        self._known[fingerprint] = (principal, time.monotonic() + min(self._cache_s, good_for_s))
        self._used.add(principal.key_id)
        return principal

    async def _look_up(self, token: str) -> tuple[Principal, float]:
        parts = split(token)
        if parts is None:
            raise Unauthenticated(_REFUSAL)
        public_id, secret = parts
        async with self._db.read() as session:
            found = await table.find_live_key(session, public_id)
        expected = found.secret_sha256 if found else _NOBODY
        if not hmac.compare_digest(expected, _hash(secret)) or found is None:
            raise Unauthenticated(_REFUSAL)
        principal = Principal(
            project_id=found.project_id,
            project=found.project,
            project_name=found.project_name,
            max_queued_jobs=found.max_queued_jobs,
            key_id=found.key_id,
            key=public_id,
            scopes=frozenset(found.scopes),
        )
        return principal, found.good_for_s

    async def flush(self) -> None:
        """Write down which keys were used since the last time."""
        used, self._used = self._used, set()
        if not used:
            return
        try:
            async with self._db.begin() as session:
                await table.touch_keys(session, sorted(used))
        except TransientError:
            self._used |= used
            raise

    async def run(self, stop: asyncio.Event) -> None:
        """Flush now and then, and once more at the end; a database that is away is waited for."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), USAGE_S)
            try:
                await self.flush()
            except TransientError as error:
                log.warning("keys.usage_not_written", reason=str(error))
