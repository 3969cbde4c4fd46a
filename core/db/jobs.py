"""Jobs of one project: inserting, reading, and the moves that its users may make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, or_, select, text, update

from core.db import events
from core.db.tables import JobRow
from core.ids import JOB, new_id
from tunery.errors import Conflict, InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncSession

_OWNED = ("starting", "running", "finishing")
_NOW = func.clock_timestamp()
# Named here, because inside the class `list` is the method.
_Page = tuple[list[JobRow], bool]


class JobRepository:
    """Jobs of one project. There is no way to ask for another project's rows."""

    def __init__(self, session: AsyncSession, project_id: int) -> None:
        self._session = session
        self._project_id = project_id

    async def insert(self, **columns: Any) -> JobRow:
        """Add a job. Its first event, and its wake-up unless `hold`, are written with it."""
        job = JobRow(**{"public_id": new_id(JOB), **columns, "project_id": self._project_id})
        self._session.add(job)
        await self._session.flush()
        return job

    async def get(self, public_id: str) -> JobRow | None:
        """One job as it is in the database now."""
        return await self._session.scalar(
            self._mine()
            .where(JobRow.public_id == public_id)
            .execution_options(populate_existing=True)
        )

    async def list(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
        states: Sequence[str] | None = None,
        model: str | None = None,
        method: str | None = None,
        metadata: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> _Page:
        """A page of jobs, newest first unless `order` is "asc", and whether more follow it.

        Raises:
            InvalidConfig: `after` is no job of this project.
        """
        query = self._mine()
        if model is not None:
            query = query.where(JobRow.model == model)
        if method is not None:
            query = query.where(JobRow.method == method)
        if metadata:
            query = query.where(JobRow.metadata_.contains(dict(metadata)))
        if created_after is not None:
            query = query.where(JobRow.created_at >= created_after)
        if created_before is not None:
            query = query.where(JobRow.created_at <= created_before)
        if states is not None:
            query = query.where(JobRow.state.in_(states))
        if after is not None:
            last = await self._cursor(after)
            query = query.where(JobRow.id < last if order == "desc" else JobRow.id > last)
        query = query.order_by(JobRow.id.desc() if order == "desc" else JobRow.id.asc())
        rows = list(await self._session.scalars(query.limit(limit + 1)))
        return rows[:limit], len(rows) > limit

    async def cancel(self, public_id: str) -> JobRow | None:
        """Cancel: at once while nobody runs it, else asked of the worker. None: no such job.

        Raises:
            Conflict: it has succeeded or failed.
        """
        job = await self._locked(public_id)
        if job is None or job.state == "cancelled":
            return job
        if job.state in ("succeeded", "failed"):
            raise _refused(job, "cancelled")
        if job.state in _OWNED:
            if job.cancel_requested_at is None:
                await self._set(job, cancel_requested_at=_NOW, phase="cancelling")
                await self._note(job, "phase", "Cancellation was requested")
        else:
            await self._set(job, cancel_requested_at=_NOW, state="cancelled")
        return await self.get(public_id)

    async def pause(self, public_id: str) -> JobRow | None:
        """Pause: at once while queued, else asked of the worker, which saves first.

        Raises:
            Conflict: it is still validating, being cancelled, or has ended.
        """
        job = await self._locked(public_id)
        if job is None or job.state == "paused":
            return job
        if job.state not in ("queued", *_OWNED) or job.cancel_requested_at is not None:
            raise _refused(job, "paused")
        if job.state == "queued":
            await self._set(job, state="paused", hold=False)
        elif job.pause_requested_at is None:
            await self._set(job, pause_requested_at=_NOW, phase="pausing")
            await self._note(job, "phase", "A pause was requested")
        return await self.get(public_id)

    async def resume(self, public_id: str, *, max_extra_errors: int = 0) -> JobRow | None:
        """Queue a paused or held job; take a pause back that was not obeyed yet.

        Resuming what already waits or runs changes nothing.

        Raises:
            Conflict: it is still validating, being cancelled, or has ended.
        """
        job = await self._locked(public_id)
        if job is None:
            return None
        if job.state not in ("queued", "paused", *_OWNED) or job.cancel_requested_at is not None:
            raise _refused(job, "resumed")
        budget = job.max_errors + max_extra_errors
        if job.state == "paused":
            await self._set(job, state="queued", run_after=_NOW, max_errors=budget)
        elif job.state == "queued" and job.hold:
            await self._release(job, budget)
        elif job.pause_requested_at is not None:
            await self._set(
                job,
                pause_requested_at=None,
                phase="preparing"
                if job.state == "starting"
                else "training"
                if job.state == "running"
                else "uploading",
            )
            await self._note(job, "phase", "The pause was taken back")
        return await self.get(public_id)

    async def request_checkpoint(self, public_id: str) -> JobRow | None:
        """Ask the running job to save at its next step.

        Raises:
            Conflict: it is not running.
        """
        job = await self._locked(public_id)
        if job is None:
            return None
        if job.state != "running":
            raise Conflict(
                f"only a running job can be asked for a checkpoint; {public_id} is {job.state}"
            )
        await self._set(job, checkpoint_requested_at=_NOW)
        return await self.get(public_id)

    async def queue_position(self, job: JobRow) -> int | None:
        """How many jobs of its queue would be taken first, plus one; None when not queued.

        By priority and age: the fair share between projects can only be known at the claim.
        """
        if job.state != "queued" or job.hold:
            return None
        ahead = await self._session.scalar(
            select(func.count())
            .select_from(JobRow)
            .where(
                JobRow.state == "queued",
                JobRow.queue == job.queue,
                JobRow.hold.is_(False),
                or_(
                    JobRow.priority > job.priority,
                    and_(
                        JobRow.priority == job.priority,
                        or_(
                            JobRow.run_after < job.run_after,
                            and_(JobRow.run_after == job.run_after, JobRow.id < job.id),
                        ),
                    ),
                ),
            )
        )
        return (ahead or 0) + 1

    def _mine(self) -> Select[JobRow]:
        return select(JobRow).where(JobRow.project_id == self._project_id)

    async def _locked(self, public_id: str) -> JobRow | None:
        """The job, which nobody else can write until this transaction ends."""
        return await self._session.scalar(
            self._mine()
            .where(JobRow.public_id == public_id)
            .with_for_update(key_share=True)
            .execution_options(populate_existing=True)
        )

    async def _set(self, job: JobRow, **values: Any) -> None:
        await self._session.execute(
            update(JobRow)
            .where(JobRow.id == job.id)
            .values(**values)
            .execution_options(synchronize_session=False)
        )

    async def _note(self, job: JobRow, kind: str, message: str) -> None:
        await events.append(self._session, job.id, kind=kind, message=message)

    async def _release(self, job: JobRow, budget: int) -> None:
        """A held job's way out: no move of state, so the wake-up and the event are ours."""
        await self._set(
            job, hold=False, run_after=_NOW, max_errors=budget, phase="waiting_for_capacity"
        )
        await self._session.execute(
            text("insert into outbox (queue) values (:queue)"), {"queue": job.queue}
        )
        await self._note(job, "phase", "The job was started by hand and waits")

    async def _cursor(self, public_id: str) -> int:
        found = await self._session.scalar(
            select(JobRow.id).where(
                JobRow.project_id == self._project_id, JobRow.public_id == public_id
            )
        )
        if found is None:
            raise InvalidConfig(f"after: no job {public_id}", param="after")
        return found


def _refused(job: JobRow, wish: str) -> Conflict:
    state = "being cancelled" if job.cancel_requested_at and job.state in _OWNED else job.state
    return Conflict(f"{job.public_id} is {state} and cannot be {wish}", code="invalid_job_state")
