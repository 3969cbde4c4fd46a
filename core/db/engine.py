"""The connection pool, and the one place where a session begins and commits."""

from __future__ import annotations

import asyncio
import select
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util import greenlet_spawn

from tunery.errors import ServiceUnavailable

__all__ = [
    "AsyncSession",
    "Database",
    "Driver",
    "driver_of",
]  # the session's type, for those who may not import SQLAlchemy

Driver = psycopg.AsyncConnection[tuple[Any, ...]]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@contextmanager
def _availability() -> Iterator[None]:
    """Turn "Postgres is away, full, slow or gave up on a lock" into `ServiceUnavailable`."""
    try:
        yield
    except PoolTimeout as error:
        raise ServiceUnavailable("all database connections are busy") from error
    except (
        OperationalError,
        InterfaceError,
        psycopg.OperationalError,
        psycopg.InterfaceError,
    ) as error:
        raise ServiceUnavailable("the database does not answer") from error
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise ServiceUnavailable("the database connection broke") from error


def _refuse_the_dead(connection: Any, record: Any, proxy: Any) -> None:
    """Have the pool replace a connection whose server has gone, before anybody uses it.

    A server that stops or kills a session closes its socket, which can then be read. Looking costs
    microseconds where SQLAlchemy's ping costs a round trip on every request.

    Raises:
        DisconnectionError: the pool's sign to connect anew.
    """
    poll = select.poll()
    poll.register(record.driver_connection.fileno(), select.POLLIN)
    if poll.poll(0):
        raise DisconnectionError("the server has closed this connection")


class Database:
    """A pool of connections to Postgres.

    Sessions read what is committed (`READ COMMITTED`); rows stay readable after a commit. Every
    way in raises `ServiceUnavailable` when Postgres is away, restarting, or out of connections.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 8,
        pool_timeout_s: float = 5.0,
        statement_timeout_s: float = 30.0,
    ) -> None:
        options = (
            f"-c statement_timeout={int(statement_timeout_s * 1000)} "
            # A holder of row locks that fell silent must not hold up everybody else.
            "-c idle_in_transaction_session_timeout=60000"
        )
        self._engine = create_async_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=pool_timeout_s,
            connect_args={
                "connect_timeout": 5,
                "options": options,
                "application_name": "tunery",
            },
        )
        event.listen(self._engine.sync_engine, "checkout", _refuse_the_dead)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._readers = async_sessionmaker(
            self._engine.execution_options(isolation_level="AUTOCOMMIT"), expire_on_commit=False
        )

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """A session whose work is rolled back unless the caller commits it.

        Raises:
            ServiceUnavailable: Postgres is away or has no connection left.
        """
        with _availability():
            async with self._sessions() as session:
                yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session for a single select: no transaction, hence two round trips less.

        Raises:
            ServiceUnavailable: Postgres is away or has no connection left.
        """
        with _availability():
            async with self._readers() as session:
                yield session

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """One transaction: committed on success, rolled back when the block raises.

        Raises:
            ServiceUnavailable: Postgres is away or has no connection left. When it went away
                during the commit, the transaction may or may not have been committed.
        """
        with _availability():
            async with self._sessions.begin() as session:
                yield session

    @asynccontextmanager
    async def direct(self) -> AsyncIterator[Driver]:
        """One transaction on a bare psycopg connection of the same pool.

        For the few paths where putting statements together would cost more than running them.
        Committed on success, rolled back when the block raises.

        Raises:
            ServiceUnavailable: as for `begin`.
        """
        with _availability():
            borrowed = await self._engine.raw_connection()
            connection: Driver = borrowed.driver_connection  # type: ignore[assignment]
            try:
                yield connection
                await connection.commit()
            except BaseException:
                # Whoever is cancelled twice must not leave without giving it back.
                await asyncio.shield(greenlet_spawn(borrowed.close))
                raise
            await greenlet_spawn(borrowed.close)

    async def ping(self) -> None:
        """Ask for an answer.

        Raises:
            ServiceUnavailable: there is none.
        """
        async with self.session() as session:
            await session.execute(text("select 1"))

    async def close(self) -> None:
        """Close every connection of the pool."""
        await self._engine.dispose()


async def driver_of(session: AsyncSession) -> Driver:
    """The psycopg connection that a session works on, in the session's transaction."""
    connection = await (await session.connection()).get_raw_connection()
    driver: Driver = connection.driver_connection  # type: ignore[assignment]
    return driver
