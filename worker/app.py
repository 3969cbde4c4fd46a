"""The Celery side of a worker: one task, and what starts and ends with the worker.

    main process      Celery's consumer; the warm pool's parent; herald's and inspector's threads
    pool children     one per device slot; each runs one supervisor at a time

The message is a doorbell: lost, late or doubled, it changes nothing, because the claim decides.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog
from celery import signals

from core.broker import WAKE, celery_app
from core.log import redact
from worker.attempt import sweep_scratch
from worker.devices import Slots, offered
from worker.environment import warm_environment
from worker.herald import Herald
from worker.inspector import Inspector
from worker.place import WorkerPlace
from worker.supervisor import Supervisor
from worker.warm import PRELOAD, WarmPool

if TYPE_CHECKING:
    from celery import Celery

    from core.settings import Settings

log = structlog.get_logger()

STOCK_LAUNCHER = "tunery.training.launch:launch"
MESSAGE_VERSION = 1


@dataclass
class Worker:
    """A worker's parts. Built once, before the pool forks; children use `settings`, `place` and
    `slots`."""

    settings: Settings
    place: WorkerPlace
    slots: Slots
    warm: WarmPool
    herald: Herald
    inspector: Inspector
    queues: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, settings: Settings) -> Worker:
        place = WorkerPlace.make(settings)
        devices = offered(settings.devices, os.environ)
        queues = [name.strip() for name in settings.queues.split(",") if name.strip()]
        slots = Slots(settings.resolved_home() / "run" / "slots", place.name, devices)
        preload: tuple[str, ...] = PRELOAD
        if settings.launcher != STOCK_LAUNCHER:
            preload = (settings.launcher.partition(":")[0],)
        warm = WarmPool(place.warm_socket, preload, warm_environment(os.environ))
        herald = Herald(settings, place, devices, queues, warm)
        inspector = Inspector(settings, queues)
        return cls(settings, place, slots, warm, herald, inspector, queues)

    def wake(self, message: dict[str, Any]) -> int:
        """There may be work for the queue that the message names; returns how many jobs ran."""
        queue = message.get("class")
        if message.get("v") != MESSAGE_VERSION or queue not in self.queues:
            log.warning("wake.not_understood", version=message.get("v"))
            return 0
        supervisor = Supervisor(self.settings, self.place, self.slots, self.queues)
        return asyncio.run(supervisor.serve())


def make_app(worker: Worker, **overrides: Any) -> Celery:
    """The Celery application of this worker; `overrides` are for tests."""
    app = celery_app(
        worker.settings.broker_url.get_secret_value(),
        worker.queues,
        worker_concurrency=len(worker.slots.devices),
        worker_redirect_stdouts=False,  # ours are whole lines already
        **overrides,
    )

    @app.task(name=WAKE, ignore_result=True)  # type: ignore[untyped-decorator]
    def wake(message: dict[str, Any]) -> int:
        return worker.wake(message)

    _bind(worker)
    return app


def _bind(worker: Worker) -> None:
    """Tie the worker's parts to Celery's life. Celery keeps weak references unless told not to."""

    def begin(sender: Any = None, **_: Any) -> None:
        refuse_solo(sender)
        # Before the pool forks: the imports take seconds, so they begin now.
        worker.warm.ensure()
        removed = sweep_scratch(worker.settings.resolved_scratch_dir())
        log.info("worker.starting", name=worker.place.name, scratch_removed=len(removed))

    def ready(**_: Any) -> None:
        worker.herald.start()
        worker.inspector.start()

    def leave(**_: Any) -> None:
        log.info("worker.draining", name=worker.place.name)
        worker.herald.leave()

    def end(**_: Any) -> None:
        worker.inspector.stop()
        worker.herald.stop()
        worker.warm.stop()
        worker.place.remove()

    signals.setup_logging.connect(set_up_logging, weak=False)
    signals.worker_init.connect(begin, weak=False)
    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(leave, weak=False)
    signals.worker_shutdown.connect(end, weak=False)


class _AsJson(logging.Formatter):
    """Celery's own lines, in the shape of ours."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "event": redact(super().format(record)),
            "logger": record.name,
            "level": record.levelname.lower(),
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
        }
        return json.dumps(line)


def set_up_logging(**_: Any) -> None:
    """In place of Celery's own set-up, which would break our lines up."""
    handler = logging.StreamHandler()
    handler.setFormatter(_AsJson())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def refuse_solo(sender: Any) -> None:
    """The solo pool does not acknowledge while a task runs: a job of hours would run twice.

    Raises:
        SystemExit: it was asked for. (Celery swallows what else a signal's receiver raises.)
    """
    if "solo" in str(sender.pool_cls):
        raise SystemExit("the solo pool runs long tasks twice: use prefork")
