"""Removing the bytes of what expired, and of what nobody will ask for any more."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from core.db import files, sweeps
from tunery.errors import TransientError

if TYPE_CHECKING:
    from core.artifacts.stores import ArtifactStore
    from core.db.engine import Database

EVERY_S = 600.0
UNFINISHED_S = 86_400.0
"""Age at which a put that is not finished belongs to a dead process."""
_DUTY = 5  # of `sweeps.on_duty`; the reconciler has those below
_PAGE = 500

log = structlog.get_logger(__name__)


async def run(
    db: Database, store: ArtifactStore, stop: asyncio.Event, *, every_s: float = EVERY_S
) -> None:
    """Sweep every so often until `stop` is set."""
    while not stop.is_set():
        try:
            await sweep(db, store)
        except TransientError as error:
            log.warning("sweep.failed", error=str(error))
        except Exception:
            # The edge of a task that must outlive what nobody foresaw.
            log.exception("sweep.broke")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), every_s)


async def sweep(db: Database, store: ArtifactStore) -> None:
    """Remove expired files, parts of ended uploads, and unfinished puts.

    An expired file is answered for as such before its bytes go; what a failure leaves is found
    again by a later sweep.

    Raises:
        StoreUnavailable, ServiceUnavailable: later.
    """
    async with db.begin() as session:
        if not await sweeps.on_duty(session, _DUTY):
            return
        await sweeps.expire_uploads(session)
        expired = await files.expired_files(session)
        for _, key in expired:
            await store.delete(key)
        await files.mark_gone(session, [id for id, _ in expired])
    uploads = await _sweep_parts(db, store)
    unfinished = await store.sweep(UNFINISHED_S)
    if expired or uploads or unfinished:
        log.info("swept", files=len(expired), uploads=uploads, unfinished_puts=unfinished)


async def _sweep_parts(db: Database, store: ArtifactStore) -> int:
    found = {key.split("/")[1] async for key in store.list("uploads")}
    ordered = sorted(found)
    count = 0
    for start in range(0, len(ordered), _PAGE):
        page = ordered[start : start + _PAGE]
        async with db.session() as session:
            pending = await files.pending_uploads(session, page)
        for upload in page:
            if upload not in pending:
                await store.delete_prefix(f"uploads/{upload}")
                count += 1
    return count
