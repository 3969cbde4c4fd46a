"""Creates that were answered, so that whoever asks again gets the same answer.

With an `Idempotency-Key`: the stored response, for a day. Without one, the stock client's retry
count is enough: a retry (count >= 1) of a body that the same API key sent with a lower count in
the last 15 minutes is that create again. A first attempt always creates.

Everything here runs in the create's own transaction: the answer is stored exactly when the thing
it tells of exists. Advisory locks, held until that transaction ends, keep a retry from overtaking
the attempt that it repeats.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, select

from core.db.tables import IdempotencyRow
from tunery.errors import Conflict, Mismatch

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncSession

KEPT_S = 24 * 3600
RETRIES_S = 15 * 60


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a create.

    Attributes:
        route: method and path template.
        key: the caller's `Idempotency-Key`.
        body_sha256: of the canonical body and, where there is no key, of who sent it.
        retry_count: how often the client says it tried before.
    """

    project_id: int
    route: str
    key: str | None
    body_sha256: bytes
    retry_count: int = 0

    @staticmethod
    def of(
        *, project_id: int, api_key_id: int, route: str, key: str | None, retries: int, body: Any
    ) -> Attempt:
        """An attempt to create what `body`, plain JSON, says."""
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        who = "" if key is not None else f"{api_key_id}\n"
        digest = hashlib.sha256(f"{who}{route}\n{canonical}".encode()).digest()
        return Attempt(project_id, route, key, digest, retries)

    @property
    def lock(self) -> int:
        """The advisory lock that attempts at the same thing share: a signed 64-bit number."""
        name = f"{self.project_id}\n{self.route}\n{self.key}".encode() if self.key else b""
        digest = hashlib.sha256(name or self.body_sha256).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    def first(self) -> bool:
        """Whether nothing can have answered it before: its lock may be shared."""
        return self.key is None and self.retry_count == 0

    def shared_lock(self) -> ColumnElement[Any]:
        """For the first statement of a first attempt; a retry waits until it is over."""
        return func.pg_advisory_xact_lock_shared(self.lock)


async def answered(session: AsyncSession, attempt: Attempt) -> dict[str, Any] | None:
    """What an earlier attempt was told; None when this one is to do the work.

    Raises:
        Conflict: the same key is at work right now (`idempotency_in_progress`).
        Mismatch: the key was used for another body.
    """
    if attempt.key is None:
        return None if attempt.retry_count == 0 else await _retried(session, attempt)
    if not await session.scalar(select(func.pg_try_advisory_xact_lock(attempt.lock))):
        raise Conflict(
            "a request with this Idempotency-Key is still being answered",
            code="idempotency_in_progress",
        )
    row = (
        await session.execute(
            select(IdempotencyRow.body_sha256, IdempotencyRow.response).where(
                IdempotencyRow.project_id == attempt.project_id,
                IdempotencyRow.route == attempt.route,
                IdempotencyRow.key == attempt.key,
                _younger_than(KEPT_S),
            )
        )
    ).one_or_none()
    if row is None:
        await _forget(session, attempt)
        return None
    if row.body_sha256 != attempt.body_sha256:
        raise Mismatch(
            "this Idempotency-Key was used for a different request",
            hint="a new request needs a new key",
        )
    response: dict[str, Any] = row.response
    return response


async def _retried(session: AsyncSession, attempt: Attempt) -> dict[str, Any] | None:
    await session.execute(select(func.pg_advisory_xact_lock(attempt.lock)))
    response: dict[str, Any] | None = await session.scalar(
        select(IdempotencyRow.response)
        .where(
            IdempotencyRow.body_sha256 == attempt.body_sha256,
            IdempotencyRow.project_id == attempt.project_id,
            IdempotencyRow.key.is_(None),
            IdempotencyRow.retry_count < attempt.retry_count,
            _younger_than(RETRIES_S),
        )
        .order_by(IdempotencyRow.id.desc())
        .limit(1)
    )
    return response


async def _forget(session: AsyncSession, attempt: Attempt) -> None:
    """Make room for a key whose day is over."""
    await session.execute(
        delete(IdempotencyRow).where(
            IdempotencyRow.project_id == attempt.project_id,
            IdempotencyRow.route == attempt.route,
            IdempotencyRow.key == attempt.key,
        )
    )


def _younger_than(seconds: int) -> ColumnElement[bool]:
    age = func.make_interval(0, 0, 0, 0, 0, 0, seconds)
    return IdempotencyRow.created_at > func.clock_timestamp() - age


async def remember(session: AsyncSession, attempt: Attempt, response: dict[str, Any]) -> None:
    """Store what this attempt is told.

    Without a key the response need only name what was made: `{"id": ...}`.
    """
    await session.execute(
        insert(IdempotencyRow).values(
            project_id=attempt.project_id,
            route=attempt.route,
            key=attempt.key,
            body_sha256=attempt.body_sha256,
            retry_count=attempt.retry_count,
            status_code=200,
            response=response,
        )
    )
