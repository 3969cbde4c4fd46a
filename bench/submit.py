"""How many jobs a second can be submitted, against what the storage allows: C0.

The bounds suppose storage whose commits take milliseconds, as network disks' and replicated
databases' do: Postgres is told to wait `COMMIT_DELAY_US` before it flushes, for both sides alike.
What this machine's own disk does is measured beside it and not judged. Each sample begins with an
empty queue and lasts `SECONDS`. The API runs with its reconciler, which empties the outbox
meanwhile. The load is made by this process, on the same cores.

    python -m bench.submit [rounds]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

import psutil
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
    from collections.abc import Callable
    from typing import Any

SECONDS = 2.0
COMMIT_DELAY_US = 5000
_COMMAND = "python -m bench.submit"
_ASKED = {
    "http": "POST of a job through HTTP",
    "core": "a job through `core.jobs.submission`, without HTTP",
}
_BOUNDS = {1: 0.8, 16: 2.0}


def _figure(side: str, clients: int, *, own_disk: bool) -> Figure:
    storage = "this machine's own disk" if own_disk else f"commits of {COMMIT_DELAY_US // 1000} ms"
    infix, suffix = ("" if side == "http" else f"-{side}"), ("-disk" if own_disk else "")
    return Figure(
        key=f"submit{infix}-{clients}{suffix}",
        what=f"{_ASKED[side]}, clients: {clients}, against single-row durable inserts on one "
        f"connection (C0); {storage}",
        subject=f"{side}-{clients}{suffix}",
        baseline=f"insert{suffix}",
        unit="per second",
        command=_COMMAND,
        at_least=None if own_disk else _BOUNDS[clients],
    )


FIGURES = [
    *(_figure(side, clients, own_disk=False) for side in _ASKED for clients in _BOUNDS),
    *(_figure("http", clients, own_disk=True) for clients in _BOUNDS),
]


def wait_before_flush(service: ServiceUnderTest, delay_us: int) -> None:
    """Have every durable commit take so much longer. With no siblings wanted, a lone one too.

    Who commits while another waits is flushed with it, as on a disk that is busy flushing.
    """
    service.query("alter system set commit_siblings = 0")
    service.query(f"alter system set commit_delay = {delay_us}")
    service.query("select pg_reload_conf()")
    until = time.monotonic() + 10
    while service.query("show commit_delay") != [(str(delay_us),)]:
        if time.monotonic() > until:
            raise RuntimeError("Postgres does not take the commit delay")
        time.sleep(0.01)


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


def cpu_ms(service: ServiceUnderTest) -> float:
    """CPU time of the API process since it began, in ms."""
    used = psutil.Process(service.api.process.pid).cpu_times()
    return 1000 * (used.user + used.system)


def main(rounds: int) -> None:
    """Take all figures in one run, each against the C0 of its round and storage."""
    quota = {"TUNERY_MAX_QUEUED_JOBS": str(10**6)}
    spent: dict[str, list[float]] = {}
    with ServiceUnderTest(worker=False, environment=quota) as service:
        tiny.add_tiny_model(service.home / "models")
        file = service.upload(tiny.jsonl(tiny.chats(20)))
        body = {"model": "tiny", "training_file": file}

        def on(delay_us: int, side: Callable[[], float]) -> Callable[[], float]:
            def measure() -> float:
                wait_before_flush(service, delay_us)
                return side()

            return measure

        def http(clients: int) -> Callable[[], float]:
            def measure() -> float:
                before = cpu_ms(service)
                rate = over_http(service, body, clients)
                per_submit = (cpu_ms(service) - before) / (rate * SECONDS)
                spent.setdefault(str(clients), []).append(round(per_submit, 3))
                return rate

            return measure

        sides = {
            "insert": on(COMMIT_DELAY_US, lambda: inserts(service)),
            "http-1": on(COMMIT_DELAY_US, http(1)),
            "core-1": on(COMMIT_DELAY_US, lambda: in_core(service, body, 1)),
            "http-16": on(COMMIT_DELAY_US, http(16)),
            "core-16": on(COMMIT_DELAY_US, lambda: in_core(service, body, 16)),
            "insert-disk": on(0, lambda: inserts(service)),
            "http-1-disk": on(0, http(1)),
            "http-16-disk": on(0, http(16)),
        }
        samples = harness.interleave(sides, rounds=rounds, say=harness.tell)
    notes = {
        "seconds": SECONDS,
        "commit_delay_us": COMMIT_DELAY_US,
        "api_cpu_ms_per_submit": {key: statistics.median(each) for key, each in spent.items()},
    }
    harness.finish(*(harness.conclude(figure, samples, **notes) for figure in FIGURES))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
