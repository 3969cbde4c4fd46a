"""Workers as processes, on a real Postgres and a real broker, with a trainer that only pretends."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest_asyncio
from sqlalchemy import select

from core.artifacts.stores import open_store
from core.broker import Broker
from core.db.jobs import JobRepository
from core.db.tables import CheckpointRow, FileRow, JobEventRow, JobRow, ProjectRow
from core.ids import FILE, PROJECT, new_id
from core.jobs import reconciler
from core.jobs.state import NEXT, TERMINAL, State
from core.local.process import spawn
from tunery.models import ModelStore
from tunery.spec import BaseModelRef, Checkpoints, Data, DataFile, Limits, TrainingSpec, Use

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Callable

    from core.artifacts.stores import ArtifactStore
    from core.db.engine import Database
    from core.settings import Settings

ROOT = Path(__file__).parents[2]
LAUNCHER = "tests.worker.fake_trainer:launch"
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 8
SECRET = "the-workers-own-secret"


async def until(holds: Callable[[], Any], within_s: float = 60.0, every_s: float = 0.05) -> Any:
    """Wait until `holds()` (or what it awaits) is true; returns it."""
    end = time.monotonic() + within_s
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"not within {within_s} s"
        await asyncio.sleep(every_s)


@dataclass
class WorkerProcess:
    """`python -m worker`."""

    popen: subprocess.Popen[bytes]
    name: str
    output: Path

    def children(self) -> list[int]:
        """The pool's: what the main process forked, without what it executed."""
        text = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in text.split()}
        return [pid for pid, line in commands.items() if b"worker.warm" not in line]

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    async def gone(self, within_s: float = 60.0) -> int:
        await until(lambda: self.popen.poll() is not None, within_s)
        return self.popen.returncode

    def text(self) -> str:
        return self.output.read_text()


@dataclass
class Farm:
    """A service without its front door: reconciler, store, project; workers on demand."""

    settings: Settings
    db: Database
    store: ArtifactStore
    broker: Broker
    folder: Path
    project_id: int = 0
    file: FileRow | None = None
    workers: list[WorkerProcess] = field(default_factory=list)

    # Workers

    def environment(self, name: str, **more: str) -> dict[str, str]:
        settings = self.settings
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "TUNERY_HOME": str(settings.home),
            "TUNERY_DATABASE_URL": settings.database_url.get_secret_value(),
            "TUNERY_BROKER_URL": settings.broker_url.get_secret_value(),
            "TUNERY_HUB_ALLOWED": "false",
            "TUNERY_LEASE_S": "3",
            "TUNERY_BEAT_S": "0.5",
            "TUNERY_STOP_GRACE_S": "2",
            "TUNERY_RETRY_BACKOFF_S": "0.1",
            "TUNERY_MAX_LOG_BYTES": "20000",
            "TUNERY_DEVICES": "cpu",
            "TUNERY_WORKER_ID": name,
            "TUNERY_LAUNCHER": LAUNCHER,
            "TUNERY_TRAINER_THREADS": "1",
            **more,
        }

    async def worker(self, name: str = "one", **environment: str) -> WorkerProcess:
        """Start a worker; returns when it takes work."""
        output = self.folder / f"{name}.log"
        popen = spawn(
            [sys.executable, "-m", "worker"],
            log=output,
            death_signal=signal.SIGKILL,  # a test run that is killed leaves no worker behind
            environment=self.environment(name, **environment),
        )
        worker = WorkerProcess(popen, name, output)
        self.workers.append(worker)
        await until(lambda: popen.poll() is not None or "ready." in worker.text(), 90)
        assert popen.poll() is None, worker.text()
        return worker

    # Jobs

    async def submit(
        self,
        *,
        max_runtime_s: int | None = None,
        keep: int = 3,
        gpus: int = 1,
        queue: str = "default",
        **config: Any,
    ) -> str:
        """Queue a job whose trainer behaves as `config` says; returns its id."""
        assert self.file is not None
        data = DataFile(
            file_id=self.file.public_id,
            sha256=self.file.sha256,
            format="prompt_completion",
            rows=8,
            size_bytes=len(ROWS),
        )
        spec = TrainingSpec(
            model=BaseModelRef(name="tiny"),
            task=Use(type="text_generation"),
            method=Use(type="supervised", config=config),
            adapter=Use(type="lora"),
            data=Data(training=data),
            seed=1,
            checkpoints=Checkpoints(keep=keep),
            limits=Limits(max_runtime_s=max_runtime_s),
        )
        return await self.queue(spec, self.file, gpus=gpus, queue=queue)

    async def queue(self, spec: TrainingSpec, file: FileRow, **columns: Any) -> str:
        """Queue a job as it was resolved; returns its id."""
        async with self.db.begin() as session:
            row = await JobRepository(session, self.project_id).insert(
                model=spec.model.name,
                method=spec.method.type,
                seed=spec.seed,
                training_file_id=file.id,
                request={},
                resolved={},
                spec=spec.model_dump(mode="json"),
                **columns,
            )
        return row.public_id

    async def upload(self, data: bytes) -> FileRow:
        """A training file of the project."""
        key = f"files/{self.project_id}/{new_id(FILE)}"

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        await self.store.put(key, chunks())
        row = FileRow(
            public_id=new_id(FILE),
            project_id=self.project_id,
            filename="rows.jsonl",
            purpose="fine-tune",
            status="processed",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            store_key=key,
            content_type="application/jsonl",
            suffix=".jsonl",
        )
        async with self.db.begin() as session:
            session.add(row)
        return row

    async def job(self, public_id: str) -> JobRow:
        async with self.db.session() as session:
            row = await JobRepository(session, self.project_id).get(public_id)
        assert row is not None
        return row

    async def wish(self, wish: str, public_id: str) -> None:
        """cancel, pause, resume or request_checkpoint."""
        async with self.db.begin() as session:
            await getattr(JobRepository(session, self.project_id), wish)(public_id)

    async def reaches(self, public_id: str, *states: str, within_s: float = 90.0) -> JobRow:
        """Wait until the job is in one of `states`."""
        end = time.monotonic() + within_s
        while (row := await self.job(public_id)).state not in states:
            assert time.monotonic() < end, (
                f"{row.state} instead of {states}: {row.error}\n{await self.story(public_id)}\n"
                + "\n".join(worker.text()[-6000:] for worker in self.workers)
            )
            await asyncio.sleep(0.05)
        return row

    async def steps(self, public_id: str, count: int, within_s: float = 60.0) -> JobRow:
        """Wait until the record knows of step `count`."""

        async def far_enough() -> JobRow | None:
            row = await self.job(public_id)
            assert row.state not in TERMINAL, row.error
            return row if row.last_step >= count else None

        row = await until(far_enough, within_s)
        assert isinstance(row, JobRow)
        return row

    async def events(self, public_id: str) -> list[JobEventRow]:
        async with self.db.session() as session:
            rows = await session.scalars(
                select(JobEventRow)
                .join(JobRow, JobRow.id == JobEventRow.job_id)
                .where(JobRow.public_id == public_id)
                .order_by(JobEventRow.seq)
            )
            return list(rows)

    async def story(self, public_id: str) -> str:
        return "\n".join(
            f"{row.attempt} {row.kind}: {row.message}" for row in await self.events(public_id)
        )

    async def checkpoints(self, public_id: str) -> list[CheckpointRow]:
        async with self.db.session() as session:
            rows = await session.scalars(
                select(CheckpointRow)
                .join(JobRow, JobRow.id == CheckpointRow.job_id)
                .where(JobRow.public_id == public_id)
                .order_by(CheckpointRow.id)
            )
            return list(rows)

    async def bytes_of(self, key: str) -> bytes:
        return b"".join([chunk async for chunk in self.store.get(key)])

    # Processes

    def trainers(self) -> list[int]:
        """Every process that works in a scratch folder: trainers and what they started."""
        scratch = str(self.settings.resolved_scratch_dir())
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if os.readlink(entry / "cwd").startswith(scratch):
                        found.append(int(entry.name))
        return found

    async def trainer(self) -> int:
        """The one trainer's process id, as soon as it runs its own code."""
        await until(lambda: self.trainers())
        (pid,) = self.trainers()
        return pid

    async def oracle(self) -> None:
        """What must be true after every fault, once things have settled."""
        async with self.db.session() as session:
            jobs = list(await session.scalars(select(JobRow)))
        for job in jobs:
            settled = job.state in TERMINAL or job.state in ("queued", "paused")
            assert settled or job.lease_until is not None, job.state
            await self._check_history(job)
            await self._check_artifacts(job)
        if all(job.owner is None for job in jobs):
            await until(lambda: not self.trainers())

    async def _check_history(self, job: JobRow) -> None:
        rows = await self.events(job.public_id)
        assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
        moves = [row for row in rows if row.to_state is not None]
        for before, after in itertools.pairwise(moves):
            assert after.from_state == before.to_state
            assert State(after.to_state or "") in NEXT[State(after.from_state or "")]
        assert moves[-1].to_state == job.state
        attempts = [row.attempt for row in rows]
        assert attempts == sorted(attempts)

    async def _check_artifacts(self, job: JobRow) -> None:
        rows = await self.checkpoints(job.public_id)
        final = [row for row in rows if row.id == job.final_checkpoint_id]
        assert len(final) == (job.state == "succeeded")
        assert (job.fine_tuned_model is not None) == (job.state == "succeeded")
        for row in rows:
            for entry in row.manifest:
                resume = entry["path"].startswith("resume/")
                if resume and (row.resume_dropped_at or row.corrupt_at):
                    continue
                data = await self.bytes_of(f"{row.prefix}/{entry['path']}")
                assert hashlib.sha256(data).hexdigest() == entry["sha256"]


@asynccontextmanager
async def open_farm(settings: Settings, db: Database, folder: Path) -> AsyncIterator[Farm]:
    """Everything but workers; what a test starts is stopped after it."""
    store = open_store(settings)
    broker = Broker(settings.broker_url.get_secret_value())
    farm = Farm(settings, db, store, broker, folder)
    _add_model(settings)
    await _add_project(farm)
    stop, poke = asyncio.Event(), asyncio.Event()
    duties = asyncio.create_task(reconciler.run(db, broker, settings, stop, poke, ring_s=1.0))
    try:
        yield farm
    finally:
        for worker in farm.workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.popen.pid, signal.SIGCONT)
                os.killpg(worker.popen.pid, signal.SIGKILL)
            worker.popen.wait()
        stop.set()
        poke.set()
        await duties
        broker.close()
    await until(lambda: not farm.trainers())


@pytest_asyncio.fixture
async def farm(settings: Settings, db: Database, tmp_path: Path) -> AsyncIterator[Farm]:
    """A service without its front door, on the run's servers."""
    async with open_farm(settings, db, tmp_path) as farm:
        yield farm


async def _add_project(farm: Farm) -> None:
    async with farm.db.begin() as session:
        project = ProjectRow(public_id=new_id(PROJECT), name="main")
        session.add(project)
        await session.flush()
        farm.project_id = project.id
    farm.file = await farm.upload(ROWS)


def _add_model(settings: Settings) -> None:
    from tests.tunery.models.folders import write_llama

    def fill(folder: Path) -> None:
        folder.rmdir()
        write_llama(folder)

    store = ModelStore(settings.resolved_models_dir())
    store.add("tiny", fill, {"kind": "folder"}, imported_at=0.0)
