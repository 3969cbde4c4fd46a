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
        cursor = await _seq(session, job.id, "since_id" if since_id else "after", since_id or after)
        rows = await events.list_events(
            session,
            job.id,
            after=cursor,
            limit=size + 1,
            order=direction,
            type=type,
            level=level,
        )
    return JSONResponse(page([event_object(row) for row in rows], size))


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
        seq = await _seq(session, job.id, "after", last) or 0

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
    wanted = [key for key in (keys or "").split(",") if key] or None
    async with parts.db.session() as session:
        job = await _head(session, caller, job_id)
        if format == "csv" or "text/csv" in request.headers.get("accept", ""):
            rows = await metrics.rows(session, job.id)
            return Response(_csv(rows), media_type="text/csv; charset=utf-8")
        series = await metrics.series(
            session, job.id, wanted, step_from, step_to, resolution or None
        )
    return JSONResponse({"object": "fine_tuning.job.metrics", "job_id": job_id, "data": series})


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
            rows = await logs.tail(session, job.id, lines)
        else:
            rows = await logs.after(session, job.id, _cursor(after), BATCH)
    last = rows[-1].seq if rows else (0 if after is None else _cursor(after))
    return PlainTextResponse("".join(row.text for row in rows), headers={"x-log-cursor": str(last)})


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
            rows = await logs.after(session, job.id, seq, BATCH)
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


async def _seq(session: Any, job: int, param: str, event_id: str | None) -> int | None:
    """The place of an event in its job's history."""
    if event_id is None:
        return None
    seq = await views.event_seq(session, job, event_id)
    if seq is None:
        raise InvalidConfig(f"{param}: the job has no event {event_id[:100]!r}", param=param)
    return seq


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


def _csv(rows: list[tuple[int, dict[str, float]]]) -> str:
    """OpenAI's five columns first, ours after, one line a step; what was not logged is empty."""
    named = [(step, _openai_names(values)) for step, values in rows]
    own = sorted({key for _, values in named for key in values} - set(OPENAI_COLUMNS))
    out = io.StringIO()
    writer = csv.DictWriter(out, [*OPENAI_COLUMNS, *own], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **values} for step, values in named)
    return out.getvalue()


def _openai_names(values: dict[str, float]) -> dict[str, float]:
    renamed = dict(values)
    if "train_mean_token_accuracy" in renamed:
        renamed["train_accuracy"] = renamed.pop("train_mean_token_accuracy")
    return renamed
