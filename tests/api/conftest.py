"""A real service over a real Postgres: uvicorn on a socket, the stock client in front of it.

There is no worker. `Worker` plays one through the claim functions that a real one uses, so that
jobs run, save and end without training anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import pytest_asyncio
import uvicorn
from openai import AsyncOpenAI

from api.app import create_app
from core import log
from core.db import claims, events, metrics, projects
from core.db.tables import FileRow
from core.ids import new_id
from core.projects.keys import SCOPES, create_key
from tunery.models import ModelStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from core.db.claims import Claim
    from core.db.engine import Database
    from core.db.tables import CheckpointRow, ProjectRow
    from core.settings import Settings

log.configure()  # tracebacks of requests that crash are read by people here too

BASE = "tests/tiny-llama"
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} + {n}?"},
            {"role": "assistant", "content": str(2 * n)},
        ]
    }
    for n in range(12)
]


def jsonl(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def base_model(settings: Settings) -> str:
    """A base model by name: all that the API reads of one is its config."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config))

    store = ModelStore(settings.resolved_models_dir())
    store.add(BASE, fill, {"kind": "folder", "location": "tests"}, imported_at=1_700_000_000)
    return BASE


async def add_file(db: Database, project_id: int, **columns: Any) -> str:
    """A validated file, as an upload would leave it."""
    content = jsonl(CHAT)
    row = FileRow(
        **{
            "public_id": new_id("file-"),
            "project_id": project_id,
            "filename": "chat.jsonl",
            "purpose": "fine-tune",
            "status": "processed",
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "store_key": new_id("files/"),
            "content_type": "application/jsonl",
            "suffix": ".jsonl",
            "format": "chat",
            "rows": len(CHAT),
            **columns,
        }
    )
    async with db.begin() as session:
        session.add(row)
    return row.public_id


@dataclass
class Service:
    """A running service, and the means to look behind it."""

    url: str
    db: Database
    settings: Settings
    app: Any
    clients: list[Any] = field(default_factory=list)

    async def key(self, project: str = "acme", scopes: Sequence[str] = SCOPES) -> str:
        async with self.db.begin() as session:
            row = await projects.find_project(session, project)
            row = row or await projects.insert_project(session, project, weight=1.0)
        assert row is not None
        return (await create_key(self.db, row, name="test", scopes=scopes))[1]

    async def project(self, name: str = "acme") -> ProjectRow:
        async with self.db.session() as session:
            row = await projects.find_project(session, name)
        assert row is not None
        return row

    async def limit(self, project: str, jobs: int) -> None:
        """Set a project's quota of open jobs."""
        async with self.db.begin() as session:
            row = await projects.find_project(session, project)
            assert row is not None
            row.max_queued_jobs = jobs

    async def add_file(self, project: str = "acme", **columns: Any) -> str:
        """A validated file of the project."""
        return await add_file(self.db, (await self.project(project)).id, **columns)

    def openai(self, key: str, **options: Any) -> AsyncOpenAI:
        client = AsyncOpenAI(api_key=key, base_url=f"{self.url}/v1", **options)
        self.clients.append(client)
        return client

    def http(self, key: str | None, **headers: str) -> httpx2.AsyncClient:
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        client = httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=30)
        self.clients.append(client)
        return client


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """The app on a free port of this machine, from its lifespan's start to its end."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


@pytest_asyncio.fixture
async def service(settings: Settings, db: Database, base_model: str) -> AsyncIterator[Service]:
    app = create_app(settings)
    async with serving(app) as url:
        made = Service(url, db, settings, app)
        yield made
        for client in made.clients:
            await (client.close() if isinstance(client, AsyncOpenAI) else client.aclose())


@pytest_asyncio.fixture
async def key(service: Service) -> str:
    return await service.key()


@pytest_asyncio.fixture
async def client(service: Service, key: str) -> AsyncOpenAI:
    return service.openai(key)


@pytest_asyncio.fixture
async def http(service: Service, key: str) -> httpx2.AsyncClient:
    return service.http(key)


@pytest_asyncio.fixture
async def data_file(service: Service, key: str) -> str:
    """Id of a validated chat file of the project."""
    return await service.add_file()


EXPORT = {
    "export/adapter_config.json": b'{"peft_type": "LORA", "r": 4}\n',
    "export/adapter_model.safetensors": bytes(range(256)) * 4096,
    "export/README.md": b"# an adapter\n",
    "resume/optimizer.pt": b"\x80\x04pickled",
}


class Worker:
    """Plays a worker: the same claim functions, nothing trained."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.db = service.db
        self.store = service.app.state.service.store

    async def claim(self) -> Claim:
        """Take the next job, as far as `running`."""
        claim = await self.claim_or_none()
        assert claim is not None, "no job is waiting"
        return claim

    async def claim_or_none(self) -> Claim | None:
        async with self.db.begin() as session:
            claim = await claims.claim_next(
                session,
                queues=["default"],
                gpus_free=8,
                worker="w1",
                ttl_s=60.0,
                cached_models=[],
            )
        if claim is not None:
            async with self.db.begin() as session:
                await claims.move(session, claim, "starting", "running")
        return claim

    async def step(self, claim: Claim, step: int, **values: float) -> None:
        async with self.db.begin() as session:
            await metrics.record(session, claim.job_id, claim.attempt, [(step, values)])
            await events.append(
                session,
                claim.job_id,
                attempt=claim.attempt,
                kind="metrics",
                type="metrics",
                message=f"Step {step}",
                data={"step": step, **values},
            )

    async def save(
        self, claim: Claim, step: int, *, final: bool = False, **metrics_: float
    ) -> CheckpointRow:
        """Publish a checkpoint with both halves."""
        from core.db import checkpoints

        prefix = f"jobs/{claim.public_id}/attempt-{claim.attempt}-{claim.owner[:8]}/step-{step:08d}"
        manifest = []
        for path, content in EXPORT.items():
            await self.store.put(f"{prefix}/{path}", once(content))
            manifest.append(
                {
                    "path": path,
                    "bytes": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "role": "adapter" if path.endswith(".safetensors") else "other",
                }
            )
        job = await self.job(claim.public_id)
        name = job["ext"]["resolved"]["fine_tuned_model"]
        async with self.db.begin() as session:
            row = await checkpoints.insert(
                session,
                claim,
                step=step,
                kinds=["export", "resume"],
                prefix=prefix,
                manifest=manifest,
                size_bytes=sum(map(len, EXPORT.values())),
                metrics=metrics_,
                name=f"{name}:ckpt-step-{step}",
                final=final,
            )
        assert row is not None
        return row

    async def job(self, public_id: str) -> dict[str, Any]:
        from core.db import views
        from core.jobs.view import job_object

        project = await self.service.project()
        async with self.db.session() as session:
            view = await views.job(session, project.id, public_id)
        assert view is not None
        return job_object(view, project.public_id)


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


@pytest.fixture
def worker(service: Service) -> Worker:
    return Worker(service)
