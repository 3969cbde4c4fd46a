"""What time does to rows, across all projects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

# Any constant of ours: the first half of a two-part advisory lock, the second says which duty.
_DUTIES = 0x7475


async def on_duty(session: AsyncSession, duty: int) -> bool:
    """Whether this transaction is the only one doing `duty`, until it ends."""
    found = await session.scalar(
        text("select pg_try_advisory_xact_lock(:duties, :duty)"),
        {"duties": _DUTIES, "duty": duty},
    )
    return bool(found)


async def expire_uploads(session: AsyncSession, *, limit: int = 1000) -> list[str]:
    """Close uploads that nobody completed in time. Returns their public ids."""
    rows = await session.scalars(
        text("""
        update uploads set status = 'expired' where id in (
          select id from uploads where status = 'pending' and expires_at <= clock_timestamp()
           order by expires_at limit :limit for update skip locked
        ) returning public_id
        """),
        {"limit": limit},
    )
    return list(rows)


async def expire_idempotency_keys(session: AsyncSession, *, older_than_s: float = 86_400.0) -> int:
    """Forget answered creates that are too old to be retried. Returns how many."""
    rows = await session.execute(
        text("""
        delete from idempotency_keys
         where created_at < clock_timestamp() - make_interval(secs => :older_than_s) returning 1
        """),
        {"older_than_s": older_than_s},
    )
    return len(rows.all())
