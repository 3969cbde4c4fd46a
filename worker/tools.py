"""What every attempt of a supervisor works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from core.artifacts.stores import ArtifactStore
    from core.db.engine import Database
    from core.settings import Settings
    from tunery.models import ModelStore


@dataclass(frozen=True)
class Tools:
    """Made once by the supervisor, shared by its attempts."""

    settings: Settings
    db: Database
    beats: Database
    """A connection that nothing else uses, with a short statement timeout."""
    store: ArtifactStore
    models: ModelStore
    warm: Path | None
    """Socket of the warm pool."""
    devices: int
    """How many this worker has: they share its cores."""
    draining: Callable[[], bool]
    disk_was_full: Callable[[], None]
    """Told when an attempt finds no room, so that the next one goes elsewhere."""
