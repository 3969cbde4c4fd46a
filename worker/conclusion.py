"""How an attempt lets go of its job: the result file, and the job's next state."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING

from core.artifacts.publish import Fenced, metrics_csv, put_once
from core.db import attempts, claims
from core.ids import FILE, new_id
from tunery.errors import AppError, NotFound, TransientError
from worker import failures
from worker.prepare import patiently

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path
    from typing import Any

    from structlog.typing import FilteringBoundLogger

    from core.db.claims import Claim
    from worker.failures import Failure
    from worker.hold import Hold
    from worker.record import Record
    from worker.tools import Tools

MAX_BACKOFF_S = 600.0


class _Refused(Exception):
    """The job may not succeed: somebody else's word came first."""


class Conclusion:
    """The ways out of an attempt. Each returns the job's new state; None: it is not ours."""

    def __init__(
        self, tools: Tools, claim: Claim, hold: Hold, record: Record, log: FilteringBoundLogger
    ) -> None:
        self._tools = tools
        self._settings = tools.settings
        self._claim = claim
        self._hold = hold
        self._record = record
        self._log = log

    async def give_back(self) -> str | None:
        """Nobody's fault: the job waits, is paused or is cancelled, as was wished."""
        return await self._let_go(lambda session: claims.yield_(session, self._claim))

    async def fail(self, failure: Failure) -> str | None:
        """The run failed: once more after a pause, or for good."""
        backoff_s = min(
            MAX_BACKOFF_S, self._settings.retry_backoff_s * 2 ** min(self._claim.attempt - 1, 16)
        )
        self._log.warning("attempt.failed", code=failure.code, why=failure.message)
        return await self._let_go(
            lambda session: claims.fail(
                session,
                self._claim,
                error=failure.as_json(),
                retryable=failure.retryable,
                backoff_s=backoff_s,
            )
        )

    async def _let_go(self, write: Callable[[Any], Awaitable[str | None]]) -> str | None:
        """Write the job's next state, for as long as the lease can still be ours."""

        async def once() -> str | None:
            async with self._tools.db.begin() as session:
                return await write(session)

        try:
            return await patiently(once, within_s=self._hold.left_s)
        except TransientError as error:
            # Nothing was written, or it was and we do not know: the lease lapses by itself.
            self._log.warning("attempt.left_to_the_reaper", why=str(error))
            return None

    async def finish(self, final: int, model: str, scratch: Path) -> str | None:
        """running -> finishing -> succeeded, with the result file.

        Args:
            final: row id of the last checkpoint.
            model: what the outcome is called.
            scratch: a folder for the result file on its way.

        Raises:
            OSError: it could not be written there.
        """
        claim, tools = self._claim, self._tools

        async def finishing() -> None:
            async with tools.db.begin() as session:
                if not self._record.started:
                    await claims.move(session, claim, "starting", "running")
                moved = await claims.move(session, claim, "running", "finishing")
                if not moved and not await claims.holds(session, claim):
                    raise Fenced(f"attempt {claim.attempt} of {claim.public_id} is over")
            self._record.started = True

        try:
            await patiently(finishing)
            table = await patiently(lambda: metrics_csv(tools.db, claim.job_id))
            key, file_id = await self._put_result(table, scratch)
        except Fenced:
            return None
        except AppError as error:
            return await self.fail(failures.of_error(error))
        digest = hashlib.sha256(table).hexdigest()

        async def commit(session: Any) -> str:
            result = await attempts.add_result_file(
                session,
                claim,
                public_id=file_id,
                store_key=key,
                sha256=digest,
                size_bytes=len(table),
            )
            return await self._commit(session, result, final, model)

        try:
            return await self._let_go(commit)
        except _Refused:
            return await self._take_back(key, file_id)

    async def _take_back(self, key: str, file_id: str) -> str | None:
        """The commit was refused: a cancel came first, somebody else owns the job, or an earlier
        try did commit although its answer was lost."""
        tools = self._tools

        async def committed() -> bool:
            async with tools.db.session() as session:
                return await attempts.file_exists(session, file_id)

        with contextlib.suppress(TransientError, NotFound):
            if await patiently(committed, within_s=self._settings.lease_s):
                return "succeeded"
            await tools.store.delete(key)
        return await self.give_back()

    async def _put_result(self, table: bytes, scratch: Path) -> tuple[str, str]:
        file_id = new_id(FILE)
        key = f"files/{self._claim.project_id}/{file_id}"
        path = scratch / "metrics.csv"
        await asyncio.to_thread(path.write_bytes, table)
        await patiently(lambda: put_once(self._tools.store, key, path))
        return key, file_id

    async def _commit(self, session: Any, result: int, final: int, model: str) -> str:
        done = self._record.done
        finished = await claims.finish(
            session,
            self._claim,
            final_checkpoint_id=final,
            fine_tuned_model=model,
            result_file_id=result,
            trained_tokens=done.trained_tokens if done else None,
            peak_memory_bytes=done.peak_memory_bytes if done else None,
        )
        if not finished:
            raise _Refused  # rolls the file's row back
        return "succeeded"
