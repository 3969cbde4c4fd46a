"""A job as a static HTML card: no script, no request, so it survives export and a dead kernel."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunery.client.objects import Job

_COLOURS = {"succeeded": "#15803d", "failed": "#b91c1c", "cancelled": "#6b7280"}
WIDTH, HEIGHT = 320, 60


def job_card(job: Job, loss: Sequence[tuple[int, float]] = ()) -> str:
    """The card; with points of the loss, their curve in it."""
    colour = _COLOURS.get(job.status, "#1d4ed8")
    rows = [("model", job.model), ("method", job.label), *_progress(job)]
    if job.fine_tuned_model:
        rows.append(("result", job.fine_tuned_model))
    if job.error:
        rows.append(("error", f"{job.error.code}: {job.error.message}"))
    cells = "".join(
        f'<tr><td style="color:#6b7280;padding:1px 12px 1px 0">{escape(name)}</td>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return (
        '<div style="border:1px solid #d1d5db;border-radius:6px;padding:10px 14px;'
        'display:inline-block;font-family:sans-serif;font-size:13px">'
        f'<div><b>{escape(job.id)}</b> <span style="color:{colour}">{escape(job.status)}</span>'
        f'</div><table style="border:0;margin:6px 0 0">{cells}</table>{curve(loss)}</div>'
    )


def _progress(job: Job) -> list[tuple[str, str]]:
    step, total = job.progress.get("step"), job.progress.get("total_steps")
    rows = [("step", f"{step:,} of {total:,}")] if step is not None and total else []
    if job.trained_tokens:
        rows.append(("trained tokens", f"{job.trained_tokens:,}"))
    return rows


def curve(points: Sequence[tuple[int, float]]) -> str:
    """An SVG line through the points, or nothing for fewer than two."""
    if len(points) < 2:
        return ""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    across = (steps[-1] - steps[0]) or 1
    tall = (high - low) or 1.0
    places = " ".join(
        f"{(step - steps[0]) / across * WIDTH:.1f},{(high - value) / tall * HEIGHT:.1f}"
        for step, value in points
    )
    return (
        f'<svg viewBox="-2 -2 {WIDTH + 4} {HEIGHT + 4}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="loss from {values[0]:.3f} to {values[-1]:.3f}">'
        f'<polyline fill="none" stroke="#1d4ed8" stroke-width="1.5" points="{places}"/></svg>'
    )
