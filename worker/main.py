"""`python -m worker`: a worker with the options that long jobs need."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from core.log import configure
from core.settings import settings
from worker.app import Worker, make_app

if TYPE_CHECKING:
    from celery import Celery


def options(worker: Worker) -> list[str]:
    """Arguments of Celery's worker command."""
    return [
        "worker",
        *("--pool", "prefork"),
        *("--concurrency", str(len(worker.slots.devices))),
        *("--queues", ",".join(worker.queues)),
        *("--hostname", f"{worker.place.name}@%h"),
        *("--loglevel", "INFO"),
        # Workers have nothing to tell each other: the record knows.
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]


def main() -> int:
    """Run until told to stop; SIGTERM drains."""
    configure()
    worker = Worker.make(settings())
    app: Celery = make_app(worker)
    try:
        app.worker_main(options(worker))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        with contextlib.suppress(RuntimeError):  # it never started
            worker.herald.stop()
        worker.warm.stop()
        worker.place.remove()
    return 0
