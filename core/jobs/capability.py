"""What the service can run: the base models that are here, the devices that live workers have."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from core.db import submissions
from tunery.errors import InvalidConfig, UnsupportedCombination
from tunery.models.store import NOTE, is_name
from tunery.resolve import DeviceFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.db.engine import Database
    from tunery.models import ModelInfo, ModelStore
    from tunery.spec import Compute

REFRESH_S = 5.0
Worker = tuple[list[str], list[dict[str, Any]]]


class BaseModels:
    """A `ModelStore` that reads a model's files once: the note's mtime says when to read again."""

    def __init__(self, store: ModelStore) -> None:
        self.store = store
        self._read: dict[str, tuple[int, ModelInfo]] = {}

    def get(self, name: str) -> ModelInfo | None:
        """The model of that name, if it is on this machine."""
        if not is_name(name):
            return None
        try:
            changed_ns = (self.store.place(name) / NOTE).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        known = self._read.get(name)
        if known is not None and known[0] == changed_ns:
            return known[1]
        info = self.store.get(name)
        if info is not None:
            self._read[name] = (changed_ns, info)
        return info

    def list(self) -> Sequence[ModelInfo]:
        return self.store.list()

    def find(self, name: str) -> ModelInfo | None:
        """The model that a job names; None when it has yet to come from the hub.

        Raises:
            InvalidConfig: it is not here and cannot be had (`model_not_found`).
        """
        info = self.get(name)
        if info is None and not (self.store.hub_allowed and is_name(name)):
            near = self.store.nearest(name)
            raise InvalidConfig(
                f"model: there is no base model {name[:200]!r}",
                code="model_not_found",
                hint=f"did you mean {near[0]!r}?" if near else "see /v1/fine_tuning/base_models",
                param="model",
            )
        return info


class Fleet:
    """The live workers, looked at every few seconds at most."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._seen_at = float("-inf")

    async def refresh(self, db: Database) -> None:
        """Look again if it is time. To be called before the fleet is asked anything.

        Raises:
            ServiceUnavailable: Postgres is away.
        """
        if time.monotonic() - self._seen_at > REFRESH_S:
            async with db.read() as session:
                self._workers = await submissions.live_workers(session)
            self._seen_at = time.monotonic()

    def devices(self, queue: str) -> DeviceFacts | None:
        """The best device that serves a queue; None when no worker is there to ask."""
        kinds = [
            _facts(device)
            for queues, devices in self._workers
            if queue in queues
            for device in devices
        ]
        return max(kinds, key=lambda facts: facts.memory_bytes or 0, default=None)

    def check(self, compute: Compute, queue: str, queues: Sequence[str]) -> None:
        """Refuse what no worker could ever start. Without workers everything may wait.

        Args:
            queues: those that the settings name; queues that live workers serve are known too.

        Raises:
            UnsupportedCombination: more hosts or devices than a worker has, or an unknown queue.
        """
        served = {name for names, _ in self._workers for name in names}
        if queue not in served.union(queues):
            known = sorted(served.union(queues))
            raise UnsupportedCombination(
                f"ext.queue: no worker serves the queue {queue!r}",
                hint=f"known: {', '.join(known)}",
                param="ext.queue",
            )
        if compute.nodes > 1:
            raise UnsupportedCombination(
                f"ext.compute.nodes: {compute.nodes} hosts are asked for, a job runs on one",
                hint="raise ext.compute.gpus instead",
                param="ext.compute.nodes",
            )
        sizes = [max(len(devices), 1) for names, devices in self._workers if queue in names]
        if sizes and compute.gpus > max(sizes):
            raise UnsupportedCombination(
                f"ext.compute.gpus: {compute.gpus} devices are asked for and the largest worker of "
                f"queue {queue!r} has {max(sizes)}",
                hint=f"at most {max(sizes)}",
                param="ext.compute.gpus",
            )


def _facts(device: dict[str, Any]) -> DeviceFacts:
    kind = "cuda" if device.get("kind") == "cuda" else "cpu"
    return DeviceFacts(
        kind="cuda" if kind == "cuda" else "cpu",
        memory_bytes=device.get("memory_bytes"),
        bf16=bool(device.get("bf16", False)),
    )
