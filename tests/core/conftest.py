"""A project with a data file, and jobs to try things on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from sqlalchemy import text

from core.db import checkpoints, claims
from core.db.jobs import JobRepository
from core.db.tables import FileRow, ProjectRow
from core.ids import FILE, PROJECT, new_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from core.db.claims import Claim
    from core.db.engine import Database
    from core.db.tables import JobRow


@dataclass
class Site:
    """One project of a database, with short ways to do what most tests do."""

    db: Database
    project_id: int
    file_id: int
    checkpoint_id: int = 0

    async def submit(self, **columns: Any) -> JobRow:
        async with self.db.begin() as s:
            return await JobRepository(s, self.project_id).insert(
                **{
                    "model": "tiny",
                    "method": "supervised",
                    "seed": 1,
                    "training_file_id": self.file_id,
                    "request": {},
                    "spec": {},
                    "resolved": {},
                    **columns,
                }
            )

    async def get(self, public_id: str) -> JobRow:
        async with self.db.session() as s:
            job = await JobRepository(s, self.project_id).get(public_id)
            assert job is not None
            return job

    async def claim(
        self, *, ttl_s: float = 30.0, worker: str = "w", **options: Any
    ) -> Claim | None:
        options = {"queues": ["default"], "gpus_free": 1, **options}
        async with self.db.begin() as s:
            return await claims.claim_next(s, worker=worker, ttl_s=ttl_s, **options)

    async def claimed(self, **options: Any) -> Claim:
        claim = await self.claim(**options)
        assert claim is not None
        return claim

    async def does(self, act: Any, *arguments: Any, **options: Any) -> Any:
        """One call in a transaction of its own."""
        async with self.db.begin() as s:
            return await act(s, *arguments, **options)

    async def may(self, move: str, public_id: str, **options: Any) -> Any:
        """One of the repository's moves in a transaction of its own."""
        async with self.db.begin() as s:
            return await getattr(JobRepository(s, self.project_id), move)(public_id, **options)

    async def checkpoint(self, claim: Claim, step: int = 1, **options: Any) -> Any:
        return await self.does(
            checkpoints.insert,
            claim,
            **{
                "step": step,
                "kinds": ["export", "resume"],
                "prefix": f"jobs/{claim.public_id}/attempt-{claim.attempt}/step-{step}",
                "manifest": [{"path": "a", "bytes": 1, "sha256": "0", "role": "export"}],
                "size_bytes": 1,
                "metrics": {},
                "name": f"ft:{claim.public_id}:{step}",
                **options,
            },
        )

    async def lapse(self, claim: Claim) -> None:
        """Let the lease run out, without waiting for it."""
        async with self.db.begin() as s:
            await s.execute(
                text(
                    "update jobs set lease_until = clock_timestamp() - interval '1s' where id = :id"
                ),
                {"id": claim.job_id},
            )


async def make_site(db: Database, name: str = "main", **columns: Any) -> Site:
    async with db.begin() as s:
        project = ProjectRow(public_id=new_id(PROJECT), name=name, **columns)
        s.add(project)
        await s.flush()
        file = FileRow(
            public_id=new_id(FILE),
            project_id=project.id,
            filename="rows.jsonl",
            purpose="fine-tune",
            status="processed",
            size_bytes=1,
            sha256="0",
            store_key="files/x",
            content_type="application/jsonl",
        )
        s.add(file)
        await s.flush()
        return Site(db, project.id, file.id)


@pytest.fixture
def new_site(db: Database) -> Callable[..., Awaitable[Site]]:
    """Makes a project: `await new_site("name", weight=2.0)`."""
    return partial(make_site, db)


@pytest_asyncio.fixture
async def site(db: Database) -> Site:
    return await make_site(db)


@pytest_asyncio.fixture
async def other(db: Database) -> Site:
    """Another project of the same database."""
    return await make_site(db, "other")
