"""Has this job changed? One statement for however many ask at once, on psycopg directly.

Polling one job is the request that the API answers most often. Whoever asks while a statement is
under way waits for the next one, which serves all who gathered meanwhile: sixteen clients cost a
query or two, not sixteen.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from sqlalchemy import make_url

from tunery.errors import ServiceUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

STATEMENT_TIMEOUT_S = 10.0

# `xmin` and `ctid` change with every update of the row. What a job's object shows besides its row
# is asked for beside them: its place in the queue, its best checkpoint, and whether its time came.
_VERSIONS = """
select a.n, j.xmin::text || j.ctid::text,
       case when j.attempt > 0 then (
         select c.public_id from checkpoints c
          where c.job_id = j.id and c.kinds @> array['export'] and c.deleted_at is null
            and c.corrupt_at is null
          order by (c.metrics ->> 'valid_loss')::double precision asc nulls last, c.id desc limit 1
       ) end,
       case when j.state = 'queued' and not j.hold then (
         select count(*) + 1 from jobs o
          where o.queue = j.queue and o.state = 'queued' and not o.hold
            and (o.priority > j.priority or (o.priority = j.priority
                 and (o.run_after, o.id) < (j.run_after, j.id)))
       ) end,
       j.run_after > clock_timestamp()
  from unnest(%s::bigint[], %s::text[]) with ordinality as a(project_id, public_id, n)
  join jobs j on j.public_id = a.public_id and j.project_id = a.project_id
"""


class Version(NamedTuple):
    """Equal versions of one job are shown alike."""

    row: str
    best_checkpoint: str | None
    position: int | None
    backing_off: bool


Key = tuple[int, str]


class JobPolls:
    """Answers `version`. Holds one connection; one per process."""

    def __init__(self, url: str) -> None:
        # libpq understands the rest of what SQLAlchemy's URLs say.
        self._conninfo = (
            make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        )
        self._connection: psycopg.AsyncConnection[tuple[object, ...]] | None = None
        self._asked: dict[Key, asyncio.Future[Version | None]] = {}
        self._working: asyncio.Task[None] | None = None

    async def version(self, project_id: int, public_id: str) -> Version | None:
        """The job's version; None when the project has no such job.

        Raises:
            ServiceUnavailable: Postgres is away.
        """
        key = (project_id, public_id)
        answer = self._asked.get(key)
        if answer is None:
            answer = self._asked[key] = asyncio.get_running_loop().create_future()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        # Others may wait for the same answer: one who leaves does not take it along.
        return await asyncio.shield(answer)

    async def _work(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                found = await self._read(list(asked))
            except psycopg.Error as error:
                for answer in asked.values():
                    refused = ServiceUnavailable("the database does not answer")
                    refused.__cause__ = error
                    answer.set_exception(refused)
                    answer.exception()  # whoever asked may be gone
                continue
            for key, answer in asked.items():
                answer.set_result(found.get(key))

    async def _read(self, keys: Sequence[Key]) -> dict[Key, Version]:
        """One statement; again on a fresh connection if the old one turns out to be dead."""
        if self._connection is not None:
            try:
                return await self._execute(self._connection, keys)
            except psycopg.OperationalError:
                await self.close()
        self._connection = await psycopg.AsyncConnection.connect(
            self._conninfo,
            autocommit=True,
            connect_timeout=5,
            options=f"-c statement_timeout={int(STATEMENT_TIMEOUT_S * 1000)}",
            application_name="tunery polls",
        )
        return await self._execute(self._connection, keys)

    @staticmethod
    async def _execute(
        connection: psycopg.AsyncConnection[tuple[object, ...]], keys: Sequence[Key]
    ) -> dict[Key, Version]:
        projects, ids = [key[0] for key in keys], [key[1] for key in keys]
        cursor = await connection.execute(_VERSIONS, (projects, ids), prepare=True)
        return {
            keys[int(n) - 1]: Version(*facts)  # type: ignore[arg-type, call-overload]
            for n, *facts in await cursor.fetchall()
        }

    async def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
