"""About the service itself: health, readiness, figures, version, queue, quota, workers."""

from __future__ import annotations

import asyncio
import platform
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.deps import Admin, JobsRead, Parts, Public
from api.figures import exposition
from core.db import views, workers
from core.jobs.view import unix, unix_or_none
from tunery import __version__
from tunery.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from api.deps import Service

router = APIRouter(tags=["service"])

PROBE_S = 2.0
SHOWN_PACKAGES = ("fastapi", "pydantic", "sqlalchemy", "celery")


@router.get("/healthz", dependencies=[Public])
async def healthz() -> Response:
    """Whether this process answers; asks nobody else."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", dependencies=[Public])
async def readyz(parts: Parts) -> Response:
    """Whether Postgres, the broker and the artifact store answer."""
    checks = {
        "postgres": parts.db.ping(),
        "broker": asyncio.to_thread(parts.broker.ping),
        "store": parts.store.ping(),
    }
    found = dict(zip(checks, await asyncio.gather(*map(_probe, checks.values())), strict=True))
    ready = all(answer == "ok" for answer in found.values())
    body = {"status": "ok" if ready else "unavailable", "checks": found}
    return JSONResponse(body, 200 if ready else 503)


async def _probe(check: Awaitable[Any]) -> str:
    try:
        await asyncio.wait_for(check, PROBE_S)
    except TimeoutError:
        return f"no answer within {PROBE_S:g} s"
    except Exception as error:  # whatever ails a part is the answer, not a crash of ours
        return type(error).__name__
    return "ok"


@router.get("/metrics", dependencies=[Public])
async def metrics(parts: Parts) -> Response:
    """Figures for Prometheus. Labels are queues and states, never jobs or projects."""
    async with parts.db.read() as session:
        counts = await views.state_counts(session)
    async with parts.db.read() as session:
        depths = await views.queue_depths(session)
    return Response(exposition(counts, depths), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", dependencies=[Public])
async def version() -> Response:
    """What is running."""
    return JSONResponse(
        {
            "version": __version__,
            "python": platform.python_version(),
            "packages": {name: version_of(name) for name in SHOWN_PACKAGES},
        }
    )


@router.get("/v1/queue")
async def queue(caller: JobsRead, parts: Parts) -> Response:
    """How long the line is, by queue, over all projects."""
    async with parts.db.read() as session:
        return JSONResponse({"object": "list", "data": await views.queue_depths(session)})


@router.get("/v1/quota")
async def quota(caller: JobsRead, parts: Parts) -> Response:
    """The project's limits and what it uses of them. A limit that is null is not set."""
    async with parts.db.session() as session:
        used = await views.usage(session, caller.project_id)
    limits = {
        "queued_jobs": caller.max_queued_jobs or parts.settings.max_queued_jobs,
        "concurrent_jobs": None,
        "gpu_seconds": None,
        "storage_bytes": None,
        "upload_bytes": parts.settings.max_file_bytes,
    }
    return JSONResponse({"object": "quota", "limits": limits, "used": used, "resets_at": None})


@router.get("/v1/workers")
async def list_workers(caller: Admin, parts: Parts) -> Response:
    """Every worker that announced itself and did not stop in order."""
    async with parts.db.read() as session:
        found = await workers.list_workers(session)
    data = [_worker(view) for view in found]
    return JSONResponse({"object": "list", "data": data, "has_more": False})


@router.get("/v1/workers/{worker_id}")
async def retrieve_worker(caller: Admin, parts: Parts, worker_id: str) -> Response:
    """One worker."""
    return await _shown(parts, worker_id)


@router.post("/v1/workers/{worker_id}/drain")
async def drain(caller: Admin, parts: Parts, worker_id: str) -> Response:
    """Have a worker hand back its jobs at their next step and take no more."""
    async with parts.db.begin() as session:
        await workers.drain(session, worker_id)
    return await _shown(parts, worker_id)


@router.post("/v1/workers/{worker_id}/undrain")
async def undrain(caller: Admin, parts: Parts, worker_id: str) -> Response:
    """Let a drained worker take work again."""
    async with parts.db.begin() as session:
        await workers.undrain(session, worker_id)
    return await _shown(parts, worker_id)


async def _shown(parts: Service, worker_id: str) -> Response:
    async with parts.db.read() as session:
        found = await workers.get(session, worker_id)
    if found is None:
        raise NotFound(f"there is no worker {worker_id[:100]!r}", code="worker_not_found")
    return JSONResponse(_worker(found))


def _worker(view: workers.WorkerView) -> dict[str, Any]:
    row = view.row
    return {
        "id": row.public_id,
        "object": "worker",
        "name": row.name,
        "host": row.host,
        "status": view.status,
        "gpus": row.devices,
        "queues": row.queues,
        "job_id": view.jobs[0] if view.jobs else None,
        "job_ids": list(view.jobs),
        "heartbeat_at": unix(row.heartbeat_at),
        "silent_s": round(view.silent_s, 1),
        "started_at": unix(row.started_at),
        "drain_requested_at": unix_or_none(row.drain_requested_at),
        "versions": row.versions,
        "cached_models": row.cached_models,
    }
