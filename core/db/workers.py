"""Workers as they describe themselves. Says who is there; never who holds a job: claims do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import aggregate_order_by, insert

from core.db.tables import JobRow, WorkerRow
from core.ids import WORKER, new_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncSession

LOST_AFTER_S = 120.0


@dataclass(frozen=True)
class WorkerView:
    """A worker, how long ago it was heard of by the database's clock, and the jobs it holds."""

    row: WorkerRow
    silent_s: float
    jobs: tuple[str, ...]

    @property
    def status(self) -> str:
        """idle, busy, draining or lost."""
        if self.silent_s > LOST_AFTER_S:
            return "lost"
        if self.row.drain_requested_at is not None:
            return "draining"
        return "busy" if self.jobs else "idle"


async def upsert(
    session: AsyncSession,
    *,
    name: str,
    host: str,
    pid: int,
    queues: Sequence[str],
    devices: Sequence[Mapping[str, Any]],
    versions: Mapping[str, Any],
    cached_models: Sequence[str],
) -> WorkerRow:
    """Register a worker that has just started. A drain that was asked of its last life is over."""
    facts: dict[str, Any] = {
        "host": host,
        "pid": pid,
        "queues": list(queues),
        "devices": [dict(device) for device in devices],
        "versions": dict(versions),
        "cached_models": list(cached_models),
    }
    now = text("clock_timestamp()")
    row: WorkerRow | None = await session.scalar(
        insert(WorkerRow)
        .values(public_id=new_id(WORKER), name=name, **facts)
        .on_conflict_do_update(
            index_elements=["name"],
            set_=facts | {"started_at": now, "heartbeat_at": now, "drain_requested_at": None},
        )
        .returning(WorkerRow),
        execution_options={"populate_existing": True},
    )
    assert row is not None
    return row


async def heartbeat(
    session: AsyncSession,
    name: str,
    *,
    devices: Sequence[Mapping[str, Any]] | None = None,
    cached_models: Sequence[str] | None = None,
) -> bool | None:
    """Say that a worker lives. Returns whether it is to drain; None: it is not registered."""
    values: dict[str, Any] = {"heartbeat_at": text("clock_timestamp()")}
    if devices is not None:
        values["devices"] = [dict(device) for device in devices]
    if cached_models is not None:
        values["cached_models"] = list(cached_models)
    return await session.scalar(
        update(WorkerRow)
        .where(WorkerRow.name == name)
        .values(values)
        .returning(WorkerRow.drain_requested_at.is_not(None))
        .execution_options(synchronize_session=False)
    )


async def list_workers(session: AsyncSession) -> list[WorkerView]:
    """Every worker that ever registered and was not removed, by name."""
    rows = await session.execute(_views().order_by(WorkerRow.name))
    return [WorkerView(row, float(silent), tuple(jobs or ())) for row, silent, jobs in rows]


async def get(session: AsyncSession, public_id: str) -> WorkerView | None:
    """One worker."""
    found = (await session.execute(_views().where(WorkerRow.public_id == public_id))).one_or_none()
    return None if found is None else WorkerView(found[0], float(found[1]), tuple(found[2] or ()))


async def drain(session: AsyncSession, public_id: str) -> bool:
    """Ask a worker to give its jobs back and stop taking work; False: no such worker."""
    asked = func.coalesce(WorkerRow.drain_requested_at, text("clock_timestamp()"))
    return await _set_drain(session, public_id, asked)


async def undrain(session: AsyncSession, public_id: str) -> bool:
    """Take the wish back; False: no such worker."""
    return await _set_drain(session, public_id, None)


async def remove(session: AsyncSession, name: str) -> None:
    """A worker that stopped in order is not "lost": it is gone."""
    await session.execute(text("delete from workers where name = :name"), {"name": name})


def _views() -> Select[Any]:
    jobs = (
        select(func.array_agg(aggregate_order_by(JobRow.public_id, JobRow.id.asc())))
        .where(JobRow.worker == WorkerRow.name, JobRow.owner.is_not(None))
        .correlate(WorkerRow)
        .scalar_subquery()
    )
    silent = func.extract("epoch", func.clock_timestamp() - WorkerRow.heartbeat_at)
    return select(WorkerRow, silent, jobs).execution_options(populate_existing=True)


async def _set_drain(session: AsyncSession, public_id: str, value: Any) -> bool:
    found = await session.scalar(
        update(WorkerRow)
        .where(WorkerRow.public_id == public_id)
        .values(drain_requested_at=value)
        .returning(WorkerRow.id)
        .execution_options(synchronize_session=False)
    )
    return found is not None
