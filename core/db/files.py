"""Data files, and uploads in parts.

A deleted file keeps its row, because jobs refer to it: it has `deleted_at`. One that expired has
both, and `expires_at <= deleted_at`, once its bytes are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import delete, exists, func, or_, select, update

from core.db.idempotency import answered, remember
from core.db.tables import FileRow, JobRow, UploadPartRow, UploadRow
from tunery.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncSession

    from core.db.idempotency import Attempt

OPEN_STATES = ("validating", "queued", "starting", "running", "finishing", "paused")


def _in(seconds: float) -> ColumnElement[Any]:
    return func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def _expired() -> ColumnElement[bool]:
    return func.coalesce(FileRow.expires_at <= func.clock_timestamp(), False)


def _used_by_open_job() -> ColumnElement[bool]:
    return exists().where(
        or_(JobRow.training_file_id == FileRow.id, JobRow.validation_file_id == FileRow.id),
        JobRow.project_id == FileRow.project_id,
        JobRow.state.in_(OPEN_STATES),
    )


@dataclass(frozen=True, slots=True)
class Found:
    """A file that exists or existed."""

    row: FileRow
    expired: bool


class FileRepository:
    """Files of one project. There is no way to ask for another project's rows."""

    def __init__(self, session: AsyncSession, project_id: int) -> None:
        self._session = session
        self._project_id = project_id

    async def insert(self, *, expires_after_s: int | None = None, **columns: Any) -> FileRow:
        """A new file; `columns` as in `FileRow`."""
        row = FileRow(project_id=self._project_id, **columns)
        if expires_after_s is not None:
            row.expires_at = _in(expires_after_s)
        self._session.add(row)
        await self._session.flush()
        await self._session.refresh(row)
        return row

    async def get(self, public_id: str) -> Found | None:
        """A file, unless it was deleted by its owner."""
        found = (
            await self._session.execute(
                select(FileRow, _expired()).where(
                    FileRow.project_id == self._project_id,
                    FileRow.public_id == public_id,
                    or_(FileRow.deleted_at.is_(None), FileRow.expires_at <= FileRow.deleted_at),
                )
            )
        ).one_or_none()
        return None if found is None else Found(*found)

    async def list(
        self,
        *,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        purpose: str | None = None,
    ) -> Sequence[FileRow] | None:
        """Up to `limit` living files by age, beginning behind `after`; None if that is unknown.

        A cursor may name a file that was deleted or expired since.
        """
        query = select(FileRow).where(
            FileRow.project_id == self._project_id, FileRow.deleted_at.is_(None), ~_expired()
        )
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        if after is not None:
            cursor = await self._session.scalar(
                select(FileRow.id).where(
                    FileRow.project_id == self._project_id, FileRow.public_id == after
                )
            )
            if cursor is None:
                return None
            query = query.where(FileRow.id > cursor if order == "asc" else FileRow.id < cursor)
        ordered = FileRow.id.asc() if order == "asc" else FileRow.id.desc()
        return list(await self._session.scalars(query.order_by(ordered).limit(limit)))

    async def delete(self, public_id: str) -> str | None:
        """Mark a file as deleted; returns its key in the store, or None if there is none.

        The lock makes a submission that names the file wait, or be waited for.

        Raises:
            Conflict: a job that is not over uses it (`file_in_use`).
        """
        row = await self._session.scalar(
            select(FileRow)
            .where(
                FileRow.project_id == self._project_id,
                FileRow.public_id == public_id,
                FileRow.deleted_at.is_(None),
            )
            .with_for_update()
        )
        if row is None:
            return None
        if await self._session.scalar(
            select(_used_by_open_job()).select_from(FileRow).where(FileRow.id == row.id)
        ):
            raise Conflict(
                f"{public_id} is used by a job that is not over",
                code="file_in_use",
                hint="cancel the job, or wait until it ends",
            )
        await self._session.execute(
            update(FileRow)
            .where(FileRow.id == row.id)
            .values(deleted_at=func.clock_timestamp(), expires_at=None)
            .execution_options(synchronize_session=False)
        )
        return row.store_key


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload with the file that it became."""

    row: UploadRow
    late: bool
    """Pending, and past its time: nobody swept it yet."""
    file: FileRow | None


class UploadRepository:
    """Uploads of one project."""

    def __init__(self, session: AsyncSession, project_id: int) -> None:
        self._session = session
        self._project_id = project_id

    async def insert(self, *, expires_in_s: float, **columns: Any) -> UploadRow:
        row = UploadRow(project_id=self._project_id, status="pending", **columns)
        row.expires_at = _in(expires_in_s)
        self._session.add(row)
        await self._session.flush()
        await self._session.refresh(row)
        return row

    async def get(self, public_id: str, *, lock: bool = False) -> Upload | None:
        """An upload. Locked, its status stays what it is until the transaction ends."""
        query = (
            select(UploadRow, UploadRow.expires_at <= func.clock_timestamp(), FileRow)
            .outerjoin(FileRow, FileRow.id == UploadRow.file_id)
            .where(UploadRow.project_id == self._project_id, UploadRow.public_id == public_id)
        )
        if lock:
            query = query.with_for_update(of=UploadRow)
        found = (await self._session.execute(query)).one_or_none()
        if found is None:
            return None
        row, late, file = found
        return Upload(row, late and row.status == "pending", file)

    async def part(self, upload: UploadRow, sha256: str) -> UploadPartRow | None:
        """The part of these bytes, if it was sent before."""
        found: UploadPartRow | None = await self._session.scalar(
            select(UploadPartRow)
            .where(UploadPartRow.upload_id == upload.id, UploadPartRow.sha256 == sha256)
            .order_by(UploadPartRow.id)
            .limit(1)
        )
        return found

    async def add_part(self, upload: UploadRow, **columns: Any) -> UploadPartRow:
        row = UploadPartRow(upload_id=upload.id, **columns)
        self._session.add(row)
        await self._session.flush()
        await self._session.refresh(row)
        return row

    async def parts(self, upload: UploadRow, public_ids: Sequence[str]) -> list[UploadPartRow]:
        """Those parts that exist, in no order."""
        query = select(UploadPartRow).where(
            UploadPartRow.upload_id == upload.id, UploadPartRow.public_id.in_(public_ids)
        )
        return list(await self._session.scalars(query))

    async def close(self, upload: UploadRow, status: str, file: FileRow | None = None) -> None:
        """End a pending upload that is locked, and forget its parts."""
        upload.status = status
        upload.file_id = None if file is None else file.id
        await self._session.execute(
            delete(UploadPartRow)
            .where(UploadPartRow.upload_id == upload.id)
            .execution_options(synchronize_session=False)
        )
        await self._session.flush()


# Sweeps, across all projects


async def expired_files(session: AsyncSession, *, limit: int = 200) -> list[tuple[int, str]]:
    """(id, store key) of files whose time is over, whose bytes lie there still, and which no
    open job uses. Locked until the transaction ends."""
    rows = await session.execute(
        select(FileRow.id, FileRow.store_key)
        .where(FileRow.deleted_at.is_(None), _expired(), ~_used_by_open_job())
        .order_by(FileRow.id)
        .limit(limit)
        .with_for_update(of=FileRow, skip_locked=True)
    )
    return [(id, key) for id, key in rows]


async def mark_gone(session: AsyncSession, ids: Sequence[int]) -> None:
    """Note that the bytes of these expired files are to be removed."""
    await session.execute(
        update(FileRow)
        .where(FileRow.id.in_(ids))
        .values(deleted_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )


async def pending_uploads(session: AsyncSession, public_ids: Sequence[str]) -> set[str]:
    """Those of these uploads that may still be completed."""
    rows = await session.scalars(
        select(UploadRow.public_id).where(
            UploadRow.public_id.in_(public_ids), UploadRow.status == "pending"
        )
    )
    return set(rows)


async def begin_create(session: AsyncSession, attempt: Attempt) -> str | None:
    """The first statement of a create: what an earlier try of it made, by public id.

    Raises:
        Conflict, Mismatch: see `core.db.idempotency.answered`.
    """
    if attempt.first():
        await session.execute(select(attempt.shared_lock()))
        return None
    earlier = await answered(session, attempt)
    return None if earlier is None else str(earlier["id"])


async def end_create(session: AsyncSession, attempt: Attempt, public_id: str) -> None:
    """Note what this try of a create made."""
    await remember(session, attempt, {"id": public_id})
