"""The container check believes the record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from core.db import workers
from worker.health import check

if TYPE_CHECKING:
    import pytest

    from core.db.engine import Database


async def _register(db: Database, name: str, host: str, silent_s: float = 0.0) -> None:
    async with db.begin() as session:
        await workers.upsert(
            session,
            name=name,
            host=host,
            pid=1,
            queues=["default"],
            devices=[],
            versions={},
            cached_models=[],
        )
        await session.execute(
            text(
                "update workers set heartbeat_at = now() - make_interval(secs => :s) "
                "where name = :name"
            ),
            {"s": silent_s, "name": name},
        )


async def test_a_worker_heard_of_lately_is_well(
    db: Database, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await _register(db, "box-1", "box", silent_s=workers.LOST_AFTER_S - 30)
    assert await check(database_url, "box") == 0
    assert capsys.readouterr().out == "box-1\n"


async def test_a_silent_worker_is_ill(db: Database, database_url: str) -> None:
    await _register(db, "box-1", "box", silent_s=workers.LOST_AFTER_S + 1)
    assert await check(database_url, "box") == 1


async def test_another_hosts_worker_does_not_count(db: Database, database_url: str) -> None:
    await _register(db, "other-1", "other")
    assert await check(database_url, "box") == 1


async def test_no_database_is_ill_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert await check("postgresql+psycopg://nobody@127.0.0.1:1/none", "box") == 1
    assert "database" in capsys.readouterr().err
