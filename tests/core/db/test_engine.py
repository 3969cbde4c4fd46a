"""The pool: commits once, rolls back on errors, and says when Postgres is away."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from core.db.engine import Database
from tunery.errors import ServiceUnavailable


async def names(db):
    async with db.session() as s:
        return list(await s.scalars(text("select name from projects order by id")))


async def add(session, name):
    await session.execute(
        text("insert into projects (public_id, name) values (:name, :name)"), {"name": name}
    )


async def test_a_transaction_is_kept_whole_or_not_at_all(db):
    async with db.begin() as s:
        await add(s, "kept")

    async def interrupted():
        async with db.begin() as s:
            await add(s, "lost")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await interrupted()
    async with db.session() as s:
        await add(s, "never committed")
    assert await names(db) == ["kept"]


async def test_a_postgres_that_is_away_is_a_transient_error(servers_dir):
    db = Database(f"postgresql+psycopg://tunery@/tunery?host={servers_dir}/nothing")
    with pytest.raises(ServiceUnavailable):
        await db.ping()
    await db.close()


async def test_a_full_pool_refuses_instead_of_hanging(database_url):
    db = Database(database_url, pool_size=1, pool_timeout_s=0.1)
    async with db.begin() as s:
        await add(s, "busy")
        with pytest.raises(ServiceUnavailable, match="busy"):
            await db.ping()
    await db.ping()
    await db.close()


async def test_a_broken_connection_costs_one_transaction(db, administer, database_url):
    name = database_url.split("@/")[1].split("?")[0]

    def kill():
        # Ten seconds to be gone in: the wish alone returns before the connection is closed.
        sql = "select pg_terminate_backend(pid, 10000) from pg_stat_activity where datname = %s"
        administer.execute(sql, [name])

    async def interrupted():
        async with db.begin() as s:
            await add(s, "lost")
            await asyncio.to_thread(kill)
            await add(s, "lost too")

    with pytest.raises(ServiceUnavailable):
        await interrupted()
    async with db.begin() as s:
        await add(s, "kept")
    await asyncio.to_thread(kill)
    assert await names(db) == ["kept"]  # the pool noticed before the query did


async def test_a_statement_that_takes_too_long_is_given_up(database_url):
    db = Database(database_url, statement_timeout_s=0.1)

    async def sleep():
        async with db.begin() as s:
            await s.execute(text("select pg_sleep(60)"))

    with pytest.raises(ServiceUnavailable):
        await sleep()
    await db.close()


async def test_a_mistake_of_ours_is_not_called_an_outage(db):
    async def mistake():
        async with db.begin() as s:
            await s.execute(text("select * from no_such_table"))

    with pytest.raises(ProgrammingError):
        await mistake()
