"""How many jobs a second can be submitted, against what the disk allows: C0.

Each sample begins with an empty queue and lasts `SECONDS`. The API runs with its reconciler, which
empties the outbox meanwhile. The load is made by this process, on the same cores.

    python -m bench.submit [rounds]
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING

import psycopg
from pydantic import SecretStr

from bench import harness, load, tiny
from bench.figures import Figure
from bench.service import ServiceUnderTest, plain
from core.db.engine import Database
from core.db.idempotency import Attempt
from core.jobs.capability import BaseModels, Fleet
from core.jobs.submission import Submitter
from core.projects.keys import KeyRing
from core.settings import Settings
from tunery.models import ModelStore

if TYPE_CHECKING:
    from typing import Any

SECONDS = 2.0
_COMMAND = "python -m bench.submit"
FIGURES = [
    Figure(
        key=f"submit-{clients}",
        what=f"POST of a job through HTTP, clients: {clients}, against single-row durable inserts "
        "on one connection (C0)",
        subject=f"http-{clients}",
        baseline="insert",
        unit="per second",
        command=_COMMAND,
        at_least=bound,
    )
    for clients, bound in ((1, 0.8), (16, 2.0))
] + [
    Figure(
        key=f"submit-core-{clients}",
        what=f"the same without HTTP (`core.jobs.submission`), callers: {clients}, against C0",
        subject=f"core-{clients}",
        baseline="insert",
        unit="per second",
        command=_COMMAND,
        at_least=bound,
    )
    for clients, bound in ((1, 0.8), (16, 2.0))
]


def inserts(service: ServiceUnderTest) -> float:
    """C0: durable single-row inserts per second on one connection."""
    body = json.dumps({"text": "x" * 1000})
    count = 0
    with psycopg.connect(plain(service.postgres.url), autocommit=True) as connection:
        connection.execute("create table if not exists c0 (id bigserial primary key, body jsonb)")
        began = time.perf_counter()
        while time.perf_counter() < began + SECONDS:
            connection.execute("insert into c0 (body) values (%s)", (body,))
            count += 1
        return count / (time.perf_counter() - began)


def over_http(service: ServiceUnderTest, body: dict[str, Any], clients: int) -> float:
    """Jobs per second through the API."""
    service.query("truncate jobs, c0 cascade")
    message = load.request("POST", "/v1/fine_tuning/jobs", service.key, body)
    return asyncio.run(load.rate(service.address, message, clients=clients, seconds=SECONDS))


def in_core(service: ServiceUnderTest, body: dict[str, Any], clients: int) -> float:
    """Jobs per second through `core.jobs.submission`, in this process."""
    service.query("truncate jobs, c0 cascade")
    return asyncio.run(_in_core(service, body, clients))


async def _in_core(service: ServiceUnderTest, body: dict[str, Any], clients: int) -> float:
    db = Database(service.postgres.url)
    caller = await KeyRing(db).authenticate(service.key)
    settings = Settings(
        home=service.home, database_url=SecretStr(service.postgres.url), max_queued_jobs=10**6
    )
    models = BaseModels(ModelStore(settings.resolved_models_dir()))
    submitter = Submitter(db, models, Fleet(), settings)
    attempt = Attempt.of(
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        route="POST /v1/fine_tuning/jobs",
        key=None,
        retries=0,
        body=body,
    )
    began = time.perf_counter()
    counts = [0] * clients

    async def client(number: int) -> None:
        while time.perf_counter() < began + SECONDS:
            await submitter.submit(caller, body, attempt)
            counts[number] += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    took_s = time.perf_counter() - began
    await db.close()
    return sum(counts) / took_s


def main(rounds: int) -> None:
    """Take all four figures in one run, against the same C0."""
    quota = {"TUNERY_MAX_QUEUED_JOBS": str(10**6)}
    with ServiceUnderTest(worker=False, environment=quota) as service:
        tiny.add_tiny_model(service.home / "models")
        file = service.upload(tiny.jsonl(tiny.chats(20)))
        body = {"model": "tiny", "training_file": file}
        sides = {
            "insert": lambda: inserts(service),
            "http-1": lambda: over_http(service, body, 1),
            "core-1": lambda: in_core(service, body, 1),
            "http-16": lambda: over_http(service, body, 16),
            "core-16": lambda: in_core(service, body, 16),
        }
        samples = harness.interleave(sides, rounds=rounds, say=harness.tell)
    harness.finish(*(harness.conclude(f, samples, seconds=SECONDS) for f in FIGURES))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
