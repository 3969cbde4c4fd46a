"""Projects and their API keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Double, case, cast, extract, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from core.db.tables import ApiKeyRow, ProjectRow
from core.ids import new_id
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncSession

FOREVER_S = 1e9
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class LiveKey:
    """A key that is neither revoked nor expired, with its project."""

    key_id: int
    secret_sha256: bytes
    scopes: list[str]
    project_id: int
    project: str
    project_name: str
    max_queued_jobs: int | None
    good_for_s: float
    """Seconds until it expires, by the database's clock."""


async def find_live_key(session: AsyncSession, public_id: str) -> LiveKey | None:
    now = func.clock_timestamp()
    left = cast(extract("epoch", ApiKeyRow.expires_at - now), Double)
    row = (
        await session.execute(
            select(
                ApiKeyRow.id,
                ApiKeyRow.secret_sha256,
                ApiKeyRow.scopes,
                ProjectRow.id,
                ProjectRow.public_id,
                ProjectRow.name,
                ProjectRow.max_queued_jobs,
                case((ApiKeyRow.expires_at.is_(None), literal(FOREVER_S)), else_=left),
            )
            .join(ProjectRow, ProjectRow.id == ApiKeyRow.project_id)
            .where(
                ApiKeyRow.public_id == public_id,
                ApiKeyRow.revoked_at.is_(None),
                or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > now),
            )
        )
    ).one_or_none()
    return None if row is None else LiveKey(*row)


async def insert_key(session: AsyncSession, **columns: Any) -> ApiKeyRow:
    row = ApiKeyRow(**columns)
    session.add(row)
    await session.flush()
    await session.refresh(row)
    return row


async def touch_keys(session: AsyncSession, ids: Sequence[int]) -> None:
    """Note that these keys were used just now."""
    await session.execute(
        update(ApiKeyRow)
        .where(ApiKeyRow.id.in_(ids))
        .values(last_used_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )


async def list_keys(session: AsyncSession, project_id: int | None) -> list[ApiKeyRow]:
    """All keys, oldest first; of one project, or of all."""
    query = select(ApiKeyRow).order_by(ApiKeyRow.id)
    if project_id is not None:
        query = query.where(ApiKeyRow.project_id == project_id)
    return list(await session.scalars(query))


async def revoke_key(session: AsyncSession, public_id: str) -> bool:
    """Whether there is such a key; revoking twice changes nothing."""
    found = await session.scalar(
        update(ApiKeyRow)
        .where(ApiKeyRow.public_id == public_id)
        .values(revoked_at=func.coalesce(ApiKeyRow.revoked_at, func.clock_timestamp()))
        .returning(ApiKeyRow.id)
        .execution_options(synchronize_session=False)
    )
    return found is not None


async def insert_project(session: AsyncSession, name: str, *, weight: float) -> ProjectRow | None:
    """A new project; None when the name is taken.

    Raises:
        InvalidConfig: a name that could not stand in a model's name.
    """
    if not NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name[:100]!r} is not a project name",
            hint="1 to 64 of a-z, 0-9, '.', '_' and '-'",
            param="name",
        )
    row: ProjectRow | None = await session.scalar(
        insert(ProjectRow)
        .values(public_id=new_id("proj_"), name=name, weight=weight)
        .on_conflict_do_nothing(index_elements=[ProjectRow.name])
        .returning(ProjectRow)
    )
    return row


async def find_project(session: AsyncSession, name_or_id: str) -> ProjectRow | None:
    found: ProjectRow | None = await session.scalar(
        select(ProjectRow).where(
            or_(ProjectRow.name == name_or_id, ProjectRow.public_id == name_or_id)
        )
    )
    return found


async def list_projects(session: AsyncSession) -> list[ProjectRow]:
    return list(await session.scalars(select(ProjectRow).order_by(ProjectRow.id)))
