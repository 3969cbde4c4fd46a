"""One job, rendered once for each change of it however often it is asked for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.db import views
from core.jobs.view import job_object

if TYPE_CHECKING:
    from core.db.engine import Database
    from core.db.polls import JobPolls, Version

KEPT = 1024
"""Rendered jobs that a process holds, some 7 kB each."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A job object as it goes over the wire."""

    body: bytes
    etag: str
    state: str


class JobReader:
    """Reads jobs by way of their versions. One per process."""

    def __init__(self, db: Database, polls: JobPolls) -> None:
        self._db = db
        self._polls = polls
        self._kept: dict[tuple[int, str], tuple[Version, Rendered]] = {}

    async def get(self, project_id: int, public_id: str, organization: str) -> Rendered | None:
        """The job; None when the project has no such job.

        Raises:
            ServiceUnavailable: Postgres is away.
        """
        key = (project_id, public_id)
        version = await self._polls.version(project_id, public_id)
        if version is None:
            return None
        kept = self._kept.get(key)
        if kept is not None and kept[0] == version:
            return kept[1]
        async with self._db.read() as session:
            view = await views.job(session, project_id, public_id)
        if view is None:
            return None
        # Read after its version: at worst newer than that, and then rendered once more.
        rendered = _render(view, organization)
        if len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = (version, rendered)
        return rendered


def _render(view: views.JobView, organization: str) -> Rendered:
    shown = job_object(view, organization)
    body = json.dumps(shown, ensure_ascii=False, separators=(",", ":")).encode()
    return Rendered(body, f'W/"{hashlib.sha256(body).hexdigest()[:32]}"', view.state)
