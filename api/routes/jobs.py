"""Fine-tuning jobs: OpenAI's routes, and what we add beside them."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api.deps import Body, JobsRead, JobsWrite, Parts, attempt_of, json_body
from api.pagination import limit_of, order_of, page
from core.db import job_edits, views
from core.db.jobs import JobRepository
from core.jobs.state import STATUS, State, states_of
from core.jobs.view import job_object
from tunery.errors import InvalidConfig, NotFound
from tunery.request import check_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    from api.deps import Service
    from core.jobs.reading import Rendered
    from core.projects.keys import Principal

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"])

CREATE = "POST /v1/fine_tuning/jobs"
LONGEST_WAIT_S = 60.0
LOOK_EVERY_S = 0.5


def no_job(job_id: str) -> NotFound:
    """What is said of a job that is not there, and of another project's."""
    return NotFound(f"there is no job {job_id[:100]!r}", code="job_not_found")


@router.post("")
async def create(caller: JobsWrite, request: Request) -> Response:
    """Create a job. A retry, with an `Idempotency-Key` or a retry count, gets the same job."""
    parts: Service = request.app.state.service
    body = await json_body(request)
    attempt = attempt_of(request, caller, CREATE, body)
    job, replayed = await parts.submitter.submit(caller, body, attempt)
    parts.bell.ring()
    return JSONResponse(job, headers={"idempotent-replayed": "true"} if replayed else None)


@router.post("/dry_run")
async def dry_run(caller: JobsWrite, parts: Parts, body: Body) -> Response:
    """What creating this job would do: resolved values, problems, warnings, estimate."""
    return JSONResponse(await parts.submitter.rehearse(caller, body))


@router.get("")
async def list_jobs(
    caller: JobsRead,
    request: Request,
    parts: Parts,
    after: str | None = None,
    limit: str | None = None,
    order: str | None = None,
) -> Response:
    """Jobs of the project, newest first.

    Filters: `metadata[key]=value`, `metadata=null`, `status`, `model`, `method`, `created_after`,
    `created_before`.
    """
    size = limit_of(limit, default=20, most=100)
    where = _filter(request.query_params)
    async with parts.db.session() as session:
        found = await views.jobs(
            session,
            caller.project_id,
            where=where,
            after=after,
            limit=size + 1,
            order=order_of(order),
        )
    if found is None:
        raise InvalidConfig(f"after: there is no job {after!r}", param="after")
    shown = [job_object(view, caller.project) for view in found[:size]]
    return JSONResponse(page(shown, more=len(found) > size))


@router.get("/{job_id}")
async def retrieve(caller: JobsRead, request: Request, job_id: str) -> Response:
    """One job. With `Prefer: wait=30`, answered when its status changes or the time is over."""
    parts: Service = request.app.state.service
    job = await _find(parts, caller, job_id)
    if (prefer := request.headers.get("prefer")) is not None:
        job = await _changed(parts, caller, job_id, job, _wait_s(prefer))
    headers = {"etag": job.etag}
    if request.headers.get("if-none-match") == job.etag:
        return Response(status_code=304, headers=headers)
    return Response(job.body, media_type="application/json", headers=headers)


@router.post("/{job_id}/cancel")
async def cancel(caller: JobsWrite, parts: Parts, job_id: str) -> Response:
    """Stop a job for good; its checkpoints stay. A running one ends at its next step."""
    async with parts.db.begin() as session:
        found = await JobRepository(session, caller.project_id).cancel(job_id)
        return await _shown(session, caller, job_id, found is not None)


@router.post("/{job_id}/pause")
async def pause(caller: JobsWrite, parts: Parts, job_id: str) -> Response:
    """Stop a job so that it can go on later, from a resume checkpoint at its next step."""
    async with parts.db.begin() as session:
        found = await JobRepository(session, caller.project_id).pause(job_id)
        return await _shown(session, caller, job_id, found is not None)


@router.post("/{job_id}/resume")
async def resume(caller: JobsWrite, parts: Parts, job_id: str, body: Body) -> Response:
    """Let a paused job, or one created with `start: "manual"`, wait for a worker again.

    The body may be empty, or `{"ext": {"max_extra_attempts": n}}`.
    """
    extra = _extra_attempts(body)
    async with parts.db.begin() as session:
        jobs = JobRepository(session, caller.project_id)
        found = await jobs.resume(job_id, max_extra_errors=extra)
        response = await _shown(session, caller, job_id, found is not None)
    parts.bell.ring()
    return response


@router.patch("/{job_id}")
async def change(caller: JobsWrite, parts: Parts, job_id: str, body: Body) -> Response:
    """Change `metadata`, and `ext.priority` while the job has not ended."""
    changes = _changes(body)
    async with parts.db.begin() as session:
        found = await job_edits.edit(session, caller.project_id, job_id, **changes)
        return await _shown(session, caller, job_id, found)


async def _find(parts: Service, caller: Principal, job_id: str) -> Rendered:
    job = await parts.reader.get(caller.project_id, job_id, caller.project)
    if job is None:
        raise no_job(job_id)
    return job


async def _shown(session: Any, caller: Principal, job_id: str, found: bool) -> Response:
    view = await views.job(session, caller.project_id, job_id) if found else None
    if view is None:
        raise no_job(job_id)
    return JSONResponse(job_object(view, caller.project))


async def _changed(
    parts: Service, caller: Principal, job_id: str, job: Rendered, wait_s: float
) -> Rendered:
    """The job once its status differs from `job`'s, or as it is after `wait_s`."""
    clock = asyncio.get_running_loop().time
    until = clock() + wait_s
    before = STATUS[State(job.state)]
    while STATUS[State(job.state)] == before and clock() < until and not parts.stopping.is_set():
        await asyncio.sleep(min(LOOK_EVERY_S, max(0.0, until - clock())))
        job = await _find(parts, caller, job_id)
    return job


def _wait_s(prefer: str) -> float:
    match = re.search(r"(?:^|[,;\s])wait=(\d{1,6})(?:$|[,;\s])", prefer)
    return min(LONGEST_WAIT_S, float(match[1])) if match else 0.0


def _filter(query: Mapping[str, str]) -> views.JobFilter:
    status = query.get("status")
    states = None if status is None else states_of(status)
    if states is not None and not states:
        known = ", ".join(dict.fromkeys(STATUS.values()))
        raise InvalidConfig(
            f"status: there is no status {status!r}", hint=f"known: {known}", param="status"
        )
    return views.JobFilter(
        states=None if states is None else tuple(states),
        model=query.get("model"),
        method=query.get("method"),
        created_after=_seconds(query, "created_after"),
        created_before=_seconds(query, "created_before"),
        metadata={
            name[len("metadata[") : -1]: value
            for name, value in query.items()
            if name.startswith("metadata[") and name.endswith("]")
        },
        no_metadata=query.get("metadata") == "null",
    )


def _seconds(query: Mapping[str, str], name: str) -> float | None:
    raw = query.get(name)
    if raw is None:
        return None
    if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", raw):
        raise InvalidConfig(f"{name}: unix seconds are expected", param=name)
    return float(raw)


def _extra_attempts(body: Any) -> int:
    if body is None or body == {}:
        return 0
    ext = body.get("ext", {}) if isinstance(body, dict) else None
    if not isinstance(ext, dict) or set(body) != {"ext"} or set(ext) - {"max_extra_attempts"}:
        raise InvalidConfig(
            "a resume takes nothing but ext.max_extra_attempts",
            code="unknown_parameter",
            param="ext",
        )
    extra = ext.get("max_extra_attempts", 0)
    if type(extra) is not int or not 0 <= extra <= 20:
        raise InvalidConfig(
            "ext.max_extra_attempts: an integer from 0 to 20 is expected",
            param="ext.max_extra_attempts",
        )
    return extra


def _changes(body: Any) -> dict[str, Any]:
    """What a PATCH may change, checked.

    Raises:
        InvalidConfig: a key that cannot be changed, or a value of the wrong kind.
    """
    if not isinstance(body, dict):
        raise InvalidConfig("the body must be a JSON object")
    ext = body.get("ext") or {}
    if not isinstance(ext, dict):
        raise InvalidConfig("ext: an object is expected", param="ext")
    fixed = [*(set(body) - {"metadata", "ext"}), *(f"ext.{key}" for key in set(ext) - {"priority"})]
    if fixed:
        raise InvalidConfig(
            f"{fixed[0][:100]}: cannot be changed after a job was created",
            code="unknown_parameter",
            hint="metadata and ext.priority can",
            param=fixed[0][:100],
        )
    changes: dict[str, Any] = {}
    if "metadata" in body:
        check_metadata(body["metadata"])
        changes["metadata"] = body["metadata"]
    if "priority" in ext:
        priority = ext["priority"]
        if type(priority) is not int or not -100 <= priority <= 100:
            raise InvalidConfig(
                "ext.priority: an integer from -100 to 100 is expected", param="ext.priority"
            )
        changes["priority"] = priority
    return changes
