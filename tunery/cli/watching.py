"""What `watch` shows: events in, lines out."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunery.cli.output import COLOURS, count, duration, emit, emit_json, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tunery.client import Event, Job

BARS = "▁▂▃▄▅▆▇█"
POINTS = 24
LOOK_EVERY_S = 1.5


def sparkline(values: Iterable[float]) -> str:
    """Values as a row of bars, the largest full."""
    numbers = list(values)
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in numbers)


class Watch:
    """What is known of a run, gathered from metric points and remarks."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.title = ""
        self.status = ""
        self.step = 0
        self.total_steps: int | None = None
        self.seconds_remaining: float | None = None
        self.tokens_per_s: float | None = None
        self.memory_bytes: float | None = None
        self.validation: tuple[int, float] | None = None
        self.losses: deque[float] = deque(maxlen=POINTS)
        self.remark = ""

    def look(self, job: Job) -> None:
        """Take what the job's own record says."""
        self.name, self.status = job.id, job.phase
        worker = (job.ext.get("attempt") or {}).get("worker_id")
        attempt = (job.ext.get("attempt") or {}).get("number") or 1
        self.title = f"{job.label}  {job.model}" + (f"  on {worker}" if worker else "")
        if attempt > 1:
            self.title += f"  attempt {attempt}"
        progress = job.progress
        self.total_steps = progress.get("total_steps") or self.total_steps
        self.step = max(self.step, progress.get("step") or 0)
        self.seconds_remaining = progress.get("seconds_remaining")
        self.tokens_per_s = progress.get("tokens_per_second") or self.tokens_per_s

    def hear(self, event: Event) -> None:
        """Take an event of the service."""
        if event.kind == "metrics":
            self.measure(int((event.data or {}).get("step") or 0), event.data or {})
        else:
            self.remark = event.message

    def measure(self, step: int, values: Mapping[str, Any]) -> None:
        """Take a metric point."""
        self.step = max(self.step, step)
        if (loss := values.get("train_loss")) is not None:
            self.losses.append(float(loss))
        for name in ("full_valid_loss", "valid_loss"):
            if values.get(name) is not None:
                self.validation = (step, float(values[name]))
                break
        self.tokens_per_s = values.get("tokens_per_second") or self.tokens_per_s
        self.memory_bytes = values.get("gpu_memory_bytes") or self.memory_bytes

    @property
    def figures(self) -> str:
        """Loss, held-out loss, speed, memory: what is known of them."""
        parts = []
        if self.losses:
            parts.append(f"loss {self.losses[-1]:.3f} {sparkline(self.losses)}")
        if self.validation:
            parts.append(f"held-out {self.validation[1]:.3f} @{self.validation[0]:,}")
        if self.tokens_per_s:
            parts.append(f"{count(self.tokens_per_s)} tok/s")
        if self.memory_bytes:
            parts.append(size(self.memory_bytes))
        return "   ".join(parts)

    @property
    def line(self) -> str:
        """All of it on one plain line."""
        of = f"/{self.total_steps}" if self.total_steps else ""
        parts = [f"step {self.step}{of}"]
        if self.losses:
            parts.append(f"loss {self.losses[-1]:.4f}")
        if self.validation:
            parts.append(f"held-out {self.validation[1]:.4f}")
        if self.tokens_per_s:
            parts.append(f"{self.tokens_per_s:.0f} tok/s")
        if self.seconds_remaining is not None:
            parts.append(f"ETA {duration(self.seconds_remaining)}")
        return "  ".join(parts)

    def render(self, footer: str) -> Group:
        """The same for a terminal: a head, a bar, figures, the last remark."""
        head = Text(f"{self.name}  {self.title}  ").append(
            self.status, style=COLOURS.get(self.status, "blue")
        )
        lines: list[Any] = [head]
        if self.total_steps:
            lines.append(self._bar())
        if self.figures:
            lines.append(Text("  " + self.figures))
        remark = f"  {self.remark}" if self.remark else ""
        lines.append(Text(f"{remark}     {footer}".rstrip(), style="dim"))
        return Group(*lines)

    def _bar(self) -> Table:
        total = self.total_steps or 1
        eta = self.seconds_remaining
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(f"  step {self.step:,}/{total:,}"),
            ProgressBar(total=total, completed=self.step, width=36),
            Text(f"{100 * self.step // total:3d}%"),
            Text(f"ETA {duration(eta)}" if eta is not None else ""),
        )
        return row


def show(
    watch: Watch,
    events: Iterable[Event],
    look: Callable[[], Job],
    *,
    as_json: bool = False,
    footer: str = "",
) -> Job:
    """Show a job until its events end; returns it as it is then.

    A terminal gets a live picture, a pipe a line per event, `as_json` the events themselves.
    """
    watch.look(look())
    if as_json or not sys.stdout.isatty():
        for event in events:
            watch.hear(event)
            if as_json:
                emit_json(event.model_dump())
            elif event.kind == "metrics":
                watch.look(look())
                emit(watch.line)
            else:
                emit(event.message)
        return look()
    return _live(watch, events, look, footer)


def _live(watch: Watch, events: Iterable[Event], look: Callable[[], Job], footer: str) -> Job:
    console = Console(file=sys.stdout, highlight=False, markup=False)
    looked_at = time.monotonic()
    with Live(watch.render(footer), console=console, refresh_per_second=4) as live:
        for event in events:
            watch.hear(event)
            if time.monotonic() - looked_at >= LOOK_EVERY_S or event.kind == "status":
                watch.look(look())
                looked_at = time.monotonic()
            live.update(watch.render(footer))
        job = look()
        watch.look(job)
        live.update(watch.render(""))
    return job
