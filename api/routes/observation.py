"""Watching a job: events, metrics, logs. Live streams replay the past first, then follow.

A stream is a reader of the tables like any other: it holds nothing that the job needs, and whoever
comes late, reloads or reconnects sees what everybody saw.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event

from api.deps import JobsRead, LogsRead, Parts
from api.pagination import limit_of, order_of, page
from api.routes.jobs import no_job
from core.db import events, logs, metrics, views
from core.jobs.state import TERMINAL
from core.jobs.view import event_object, unix
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from api.deps import Service
    from core.projects.keys import Principal

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["observation"])

KEEP_ALIVE_S = 15.0
POLL_S = 0.4
BATCH = 200
DONE = format_sse_event(data_str="[DONE]")
KEEP_ALIVE = b": keep-alive\n\n"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
OPENAI_COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
)
OPENAI_NAMES = {"train_mean_token_accuracy": "train_accuracy"}
DEFAULT_RESOLUTION = 500
MOST_BUCKETS = 5000


@router.get("/events")
async def list_events(
    caller: JobsRead,
    parts: Parts,
    job_id: str,
    after: str | None = None,
    since_id: str | None = None,
    limit: str | None = None,
    order: str | None = None,
    type: str | None = None,
    level: str | None = None,
) -> Response:
    """A job's events, newest first; `order=asc` and `since_id` read forward."""
    size = limit_of(limit, default=20, most=100)
    direction = order_of(order, default="asc" if since_id else "desc")
    async with parts.db.session() as session:
        job = await _head(session, caller, job_id)
        found = await events.list_events(
            session,
            job.id,
            after=since_id or after,
            limit=size,
            order=direction,
            type=type,
            level=level,
        )
    if found is None:
        raise _no_event("since_id" if since_id else "after")
    rows, more = found
    return JSONResponse(page([event_object(row) for row in rows], more=more))


@router.get("/events/stream")
async def stream_events(
    caller: JobsRead, request: Request, parts: Parts, job_id: str, after: str | None = None
) -> Response:
    """Server-sent events: all that happened, then what happens, until the job has ended.

    `id:` is the event's id; `Last-Event-ID`, or `?after=`, goes on behind it.
    """
    last = request.headers.get("last-event-id") or after
    async with parts.db.session() as session:
        job = await _head(session, caller, job_id)
        seq = 0 if last is None else await events.seq_of(session, job.id, last)
    if seq is None:
        raise _no_event("after")

    async def newer(seq: int) -> tuple[list[bytes], int, bool]:
        async with parts.db.session() as session:
            # The head first: an ended job's history is complete by then.
            head = await _head(session, caller, job_id)
            if head.last_event_seq <= seq:
                return [], seq, head.state in TERMINAL
            rows = await events.events_after(session, job.id, seq, BATCH)
        frames = [
            format_sse_event(data_str=json.dumps(event_object(row)), id=row.public_id)
            for row in rows
        ]
        return frames, rows[-1].seq if rows else seq, False

    return _stream(parts, newer, seq)


@router.get("/metrics")
async def read_metrics(
    caller: JobsRead,
    request: Request,
    parts: Parts,
    job_id: str,
    keys: str | None = None,
    step_from: int | None = None,
    step_to: int | None = None,
    resolution: int | None = None,
    format: str | None = None,
) -> Response:
    """Logged values by key, as columns; CSV with `Accept: text/csv` or `format=csv`.

    `resolution` is the number of buckets wanted: each is shown by its first, smallest, largest and
    last logged point, so that nothing is drawn that was not measured.
    """
    async with parts.db.session() as session:
        job = await _head(session, caller, job_id)
        if format == "csv" or "text/csv" in request.headers.get("accept", ""):
            text = await _csv(session, job.id)
            return Response(text, media_type="text/csv; charset=utf-8")
        series = await metrics.series(
            session,
            job.id,
            [key for key in (keys or "").split(",") if key] or None,
            _step(step_from),
            _step(step_to),
            max(1, min(resolution or DEFAULT_RESOLUTION, MOST_BUCKETS)),
        )
    return JSONResponse(
        {
            "object": "fine_tuning.job.metrics",
            "job_id": job_id,
            "data": {
                key: {
                    "steps": [point.step for point in points],
                    "values": [point.value for point in points],
                    "logged_at": [round(point.at.timestamp(), 3) for point in points],
                }
                for key, points in series.items()
            },
        }
    )


@router.get("/logs")
async def read_logs(
    caller: LogsRead,
    parts: Parts,
    job_id: str,
    tail: str | None = None,
    after: str | None = None,
) -> Response:
    """The trainer's output as text. `x-log-cursor` is the `after` that reads on from here."""
    lines = limit_of(tail, default=200, most=10_000)
    async with parts.db.session() as session:
        job = await _head(session, caller, job_id)
        if after is None:
            # A chunk has at least one line but for the longest ones.
            rows = await logs.tail(session, job.id, lines)
        else:
            rows = await logs.after(session, job.id, _cursor(after), limit=BATCH)
    text = "".join(row.text for row in rows)
    if after is None:
        text = "".join(text.splitlines(keepends=True)[-lines:])
    last = rows[-1].seq if rows else (0 if after is None else _cursor(after))
    return PlainTextResponse(text, headers={"x-log-cursor": str(last)})


@router.get("/logs/stream")
async def stream_logs(
    caller: LogsRead, request: Request, parts: Parts, job_id: str, after: str | None = None
) -> Response:
    """Server-sent chunks of the trainer's output; `id:` is the cursor that resumes."""
    last = request.headers.get("last-event-id") or after
    seq = 0 if last is None else _cursor(last)
    async with parts.db.session() as session:
        job = await _head(session, caller, job_id)

    async def newer(seq: int) -> tuple[list[bytes], int, bool]:
        async with parts.db.session() as session:
            head = await _head(session, caller, job_id)
            rows = await logs.after(session, job.id, seq, limit=BATCH)
        frames = [
            format_sse_event(
                data_str=json.dumps(
                    {"ts": unix(row.at), "attempt": row.attempt, "seq": row.seq, "text": row.text}
                ),
                id=str(row.seq),
            )
            for row in rows
        ]
        return frames, rows[-1].seq if rows else seq, not rows and head.state in TERMINAL

    return _stream(parts, newer, seq)


async def _head(session: Any, caller: Principal, job_id: str) -> views.JobHead:
    found = await views.head(session, caller.project_id, job_id)
    if found is None:
        raise no_job(job_id)
    return found


def _step(asked: int | None) -> int | None:
    """A step that Postgres can compare with; no job has one beyond."""
    return None if asked is None else max(-1, min(asked, 2**62))


def _no_event(param: str) -> InvalidConfig:
    return InvalidConfig(f"{param}: the job has no such event", param=param)


def _cursor(raw: str) -> int:
    if not (raw.isdecimal() and len(raw) < 18):
        raise InvalidConfig("after: a cursor from x-log-cursor or id: is expected", param="after")
    return int(raw)


def _stream(
    parts: Service,
    newer: Callable[[int], Awaitable[tuple[list[bytes], int, bool]]],
    seq: int,
) -> StreamingResponse:
    """Follow `newer(seq) -> (frames, seq, ended)` until it has ended, keeping the line alive."""

    async def frames() -> AsyncIterator[bytes]:
        at = seq
        clock = asyncio.get_running_loop().time
        spoke_at = clock()
        while not parts.stopping.is_set():
            found, at, ended = await newer(at)
            for frame in found:
                yield frame
            if ended:
                yield DONE
                return
            if found:
                spoke_at = clock()
                continue
            if clock() - spoke_at >= KEEP_ALIVE_S:
                yield KEEP_ALIVE
                spoke_at = clock()
            await asyncio.sleep(POLL_S)

    return StreamingResponse(frames(), media_type="text/event-stream", headers=STREAM_HEADERS)


async def _csv(session: Any, job: int) -> str:
    """OpenAI's five columns first, ours after, one line a step; what was not logged is empty."""
    logged = {OPENAI_NAMES.get(key, key) for key in await metrics.latest(session, job)}
    out = io.StringIO()
    writer = csv.DictWriter(
        out, [*OPENAI_COLUMNS, *sorted(logged - set(OPENAI_COLUMNS))], lineterminator="\n"
    )
    writer.writeheader()
    async for step, values in metrics.rows(session, job):
        writer.writerow(
            {"step": step, **{OPENAI_NAMES.get(key, key): value for key, value in values.items()}}
        )
    return out.getvalue()
