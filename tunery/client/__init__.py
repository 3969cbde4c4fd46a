"""Clients of the service, sync and async. Errors are those of `tunery.errors`, by `code`."""

from tunery.client.aio import AsyncTunery
from tunery.client.objects import Checkpoint, Event, File, Job, ManifestFile, Metrics
from tunery.client.sync import Tunery
from tunery.client.wire import WaitTimeout

__all__ = [
    "AsyncTunery",
    "Checkpoint",
    "Event",
    "File",
    "Job",
    "ManifestFile",
    "Metrics",
    "Tunery",
    "WaitTimeout",
]
