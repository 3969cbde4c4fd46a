"""The service's figures in Prometheus' text form, made afresh for each scrape from the tables.

The registry is built per scrape: every API process tells the same story, and a label exists only
while it means something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from tunery import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prometheus_client.core import Metric


def exposition(jobs: Mapping[tuple[str, str], int], queues: Sequence[Mapping[str, Any]]) -> bytes:
    """What `GET /metrics` answers.

    Args:
        jobs: (queue, state) to how many.
        queues: rows of `core.db.views.queue_depths`.
    """
    registry = CollectorRegistry()
    registry.register(_Tables(jobs, queues))
    return generate_latest(registry)


class _Tables:
    """A collector over rows that were read already."""

    def __init__(
        self, jobs: Mapping[tuple[str, str], int], queues: Sequence[Mapping[str, Any]]
    ) -> None:
        self._jobs = jobs
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("tunery_build_info", "Always 1.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        jobs = GaugeMetricFamily(
            "tunery_jobs", "Jobs by queue and state.", labels=["queue", "state"]
        )
        for (queue, state), count in self._jobs.items():
            jobs.add_metric([queue, state], count)
        yield jobs
        yield self._by_queue(
            "tunery_queue_oldest_wait_seconds",
            "How long the job that waits longest has been runnable.",
            "oldest_waiting_s",
        )
        yield self._by_queue(
            "tunery_queue_devices_in_use", "Devices held by running jobs.", "gpus_in_use"
        )

    def _by_queue(self, name: str, help_text: str, key: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, help_text, labels=["queue"])
        for row in self._queues:
            family.add_metric([row["queue"]], float(row[key] or 0))
        return family
