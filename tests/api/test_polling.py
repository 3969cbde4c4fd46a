"""A job that is asked for often is rendered seldom, and never shown as it was."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from core.db import claims
from core.db.polls import JobPolls
from tests.api.test_jobs import JOBS

if TYPE_CHECKING:
    import httpx2
    import psycopg

    from tests.api.conftest import Service, Worker


@pytest.fixture
def body(data_file: str, base_model: str) -> dict[str, Any]:
    return {"model": base_model, "training_file": data_file}


async def test_whatever_a_job_shows_is_shown_when_it_changes(
    http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    ahead = (await http.post(JOBS, json=body)).json()["id"]
    job = (await http.post(JOBS, json=body)).json()["id"]

    async def ext() -> Any:
        shown: dict[str, Any] = (await http.get(f"{JOBS}/{job}")).json()
        again = (await http.get(f"{JOBS}/{job}")).json()
        assert again == shown
        return shown["ext"]

    assert (await ext())["queue"]["position"] == 2
    await http.post(f"{JOBS}/{ahead}/cancel")  # another row
    assert (await ext())["queue"]["position"] == 1
    claim = await worker.claim()
    async with worker.db.begin() as session:
        await claims.beat(session, claim, ttl_s=60.0, step=3)
    assert (await ext())["progress"]["step"] == 3
    first = await worker.save(claim, 3, valid_loss=2.0)
    assert (await ext())["artifacts"]["best_checkpoint"] == first.public_id
    better = await worker.save(claim, 4, valid_loss=1.0)  # another table
    assert (await ext())["artifacts"]["best_checkpoint"] == better.public_id
    error = {"code": "worker_lost", "message": "m", "category": "platform", "retriable": True}
    async with worker.db.begin() as session:
        await claims.fail(session, claim, error=error, retryable=True, backoff_s=1.0)
    assert (await ext())["phase"] == "backing_off"
    await asyncio.sleep(1.1)  # nothing is written: its time has come
    assert (await ext())["phase"] == "waiting_for_capacity"


async def test_many_who_ask_at_once_share_a_statement(
    service: Service,
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [(await http.post(JOBS, json=body)).json()["id"] for _ in range(3)]
    project = (await service.project()).id
    polls = JobPolls(service.settings.database_url.get_secret_value())
    asked: list[int] = []
    read = polls._read

    async def counted(keys: Any) -> Any:
        asked.append(len(keys))
        return await read(keys)

    monkeypatch.setattr(polls, "_read", counted)
    await polls.version(project, jobs[0])
    asked.clear()
    answers = await asyncio.gather(
        *(polls.version(project, job) for job in jobs * 20),
        polls.version(project, "ftjob-none"),
        polls.version(project + 1, jobs[0]),
    )
    assert len(asked) <= 2
    assert answers[-2:] == [None, None]
    assert answers[:3] == answers[3:6]
    assert None not in answers[:60]
    await polls.close()


async def test_a_connection_that_died_is_replaced(
    service: Service, http: httpx2.AsyncClient, body: dict[str, Any], administer: psycopg.Connection
) -> None:
    job = (await http.post(JOBS, json=body)).json()["id"]
    assert (await http.get(f"{JOBS}/{job}")).status_code == 200
    ended = administer.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name = 'tunery polls'"
    ).fetchall()
    assert ended
    assert (await http.get(f"{JOBS}/{job}")).status_code == 200


async def test_who_asks_while_postgres_is_away_is_told_so() -> None:
    from tunery.errors import ServiceUnavailable

    polls = JobPolls("postgresql+psycopg://nobody@127.0.0.1:1/none")
    answers = await asyncio.gather(
        *(polls.version(1, f"ftjob-{n}") for n in range(3)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [ServiceUnavailable] * 3
