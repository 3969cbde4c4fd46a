"""The async client: the same calls as `tunery.client.sync`, awaited."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from tunery.client import calls, credentials, sse, wire
from tunery.client.download import Landing
from tunery.client.objects import Checkpoint, Event, File, Job, ManifestFile, Metrics
from tunery.client.sync import GIVE_UP_S, HOLD_S
from tunery.errors import ServiceUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType

T = TypeVar("T")


class AsyncTunery:
    """Talks to one service; see `tunery.client.Tunery` for arguments and errors."""

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        found = credentials.find(base_url, api_key)
        self.base_url = found.base_url
        self._http = httpx2.AsyncClient(
            base_url=found.base_url,
            headers=wire.headers(found.api_key),
            timeout=httpx2.Timeout(wire.READ_TIMEOUT_S, connect=wire.CONNECT_TIMEOUT_S),
            trust_env=not wire.is_loopback(found.base_url),
            transport=transport,
        )
        self.jobs = AsyncJobs(self)
        self.checkpoints = AsyncCheckpoints(self)
        self.files = AsyncFiles(self)

    async def __aenter__(self) -> AsyncTunery:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Base models that can be trained, and what training made."""
        return await self.send(calls.list_models())

    async def send(self, call: wire.Call[T]) -> T:
        """Make a call; what is safe to repeat is repeated when the service is away for a moment."""
        attempts = wire.ATTEMPTS if call.repeatable else 1
        for attempt in range(1, attempts + 1):
            try:
                return call.parse(await self._once(call))
            except ServiceUnavailable:
                if attempt == attempts:
                    raise
                await asyncio.sleep(wire.pause_before(attempt))
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, call: wire.Call[Any]) -> Any:
        try:
            response = await self._http.request(
                call.method,
                call.path,
                params=dict(call.params),
                json=call.json,
                headers=dict(call.headers),
            )
        except httpx2.TransportError as error:
            raise wire.unreachable(self.base_url, error) from error
        return wire.checked(response).json()

    @asynccontextmanager
    async def stream(self, path: str, **options: Any) -> AsyncIterator[httpx2.Response]:
        """A response whose body is read as it comes."""
        try:
            async with self._http.stream("GET", path, **options) as response:
                if not response.is_success:
                    await response.aread()
                yield wire.checked(response)
        except httpx2.TransportError as error:
            raise wire.unreachable(self.base_url, error) from error

    async def pages(
        self, call: Callable[[str | None], wire.Call[dict[str, Any]]]
    ) -> AsyncIterator[Any]:
        """Every row of a list, a page at a time."""
        after: str | None = None
        while True:
            page = await self.send(call(after))
            for row in page["data"]:
                yield row
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    async def upload(self, path: Path, name: str, purpose: str) -> File:
        """Send a file as it is read; memory stays flat."""
        try:
            with path.open("rb") as stream:
                response = await self._http.post(
                    "/v1/files",
                    data={"purpose": purpose},
                    files={"file": (name, stream)},
                    timeout=httpx2.Timeout(None, connect=wire.CONNECT_TIMEOUT_S),
                )
        except httpx2.TransportError as error:
            raise wire.unreachable(self.base_url, error) from error
        return File.model_validate(wire.checked(response).json())


class AsyncJobs:
    """`client.jobs`."""

    def __init__(self, client: AsyncTunery) -> None:
        self._client = client

    async def create(self, **body: Any) -> Job:
        return await self._client.send(calls.create_job(body))

    async def dry_run(self, **body: Any) -> dict[str, Any]:
        return await self._client.send(calls.dry_run(body))

    async def get(self, job_id: str) -> Job:
        return await self._client.send(calls.get_job(job_id))

    async def list(self, **filters: Any) -> AsyncIterator[Job]:
        """Newest first."""
        async for row in self._client.pages(lambda after: calls.list_jobs(after, filters)):
            yield Job.model_validate(row)

    async def cancel(self, job_id: str) -> Job:
        return await self._client.send(calls.move_job(job_id, "cancel"))

    async def pause(self, job_id: str) -> Job:
        return await self._client.send(calls.move_job(job_id, "pause"))

    async def resume(self, job_id: str) -> Job:
        return await self._client.send(calls.move_job(job_id, "resume"))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it is done.

        Raises:
            WaitTimeout: it is not, after `timeout_s`; the job goes on.
        """
        clock = asyncio.get_running_loop().time
        deadline = None if timeout_s is None else clock() + timeout_s
        while True:
            left = HOLD_S if deadline is None else min(HOLD_S, deadline - clock())
            job = await self._client.send(calls.get_job(job_id, max(0, int(left))))
            if job.done:
                return job
            if deadline is not None and clock() >= deadline:
                raise wire.WaitTimeout(f"job {job_id} is {job.status} after {timeout_s:g} s")
            await asyncio.sleep(0.2)

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[Event]:
        """All events so far, oldest first, behind the one with the id `after`."""
        async for row in self._client.pages(lambda at: calls.list_events(job_id, at or after)):
            yield Event.model_validate(row)

    async def follow(self, job_id: str, after: str | None = None) -> AsyncIterator[Event]:
        """All events, those to come included, until the job is done; see the sync client."""
        parser = sse.Parser()
        parser.last_id = after
        clock = asyncio.get_running_loop().time
        away_since: float | None = None
        attempt = 0
        while True:
            try:
                async for event in self._stream_once(job_id, parser):
                    if event is None:
                        return
                    away_since, attempt = None, 0
                    yield event
            except ServiceUnavailable:
                away_since = away_since or clock()
                if clock() - away_since > GIVE_UP_S:
                    raise
            attempt = min(attempt + 1, 5)
            await asyncio.sleep(wire.pause_before(attempt))

    async def _stream_once(self, job_id: str, parser: sse.Parser) -> AsyncIterator[Event | None]:
        parser.reset()
        path = calls.job_path(job_id, "events", "stream")
        async with self._client.stream(path, headers=parser.headers) as response:
            async for line in response.aiter_lines():
                message = parser.feed(line)
                if message is not None:
                    yield None if message.data == "[DONE]" else calls.event_of(message.data)

    async def metrics(
        self, job_id: str, keys: Sequence[str] | None = None, resolution: int | None = None
    ) -> Metrics:
        """Logged points; `resolution` thins them to that many buckets."""
        return await self._client.send(calls.metrics(job_id, keys, resolution))


class AsyncCheckpoints:
    """`client.checkpoints`."""

    def __init__(self, client: AsyncTunery) -> None:
        self._client = client

    async def list(self, job_id: str) -> AsyncIterator[Checkpoint]:
        """Newest first."""
        async for row in self._client.pages(lambda at: calls.list_checkpoints(job_id, at)):
            yield Checkpoint.model_validate(row)

    async def get(self, job_id: str, checkpoint: str = "latest") -> Checkpoint:
        return await self._client.send(calls.get_checkpoint(job_id, checkpoint))

    async def manifest(self, job_id: str, checkpoint: str = "latest") -> Sequence[ManifestFile]:
        return await self._client.send(calls.manifest(job_id, checkpoint))

    async def download(
        self, job_id: str, folder: str | Path, checkpoint: str = "latest"
    ) -> Sequence[ManifestFile]:
        """Download a checkpoint's files, each verified by its sha256; returns the manifest.

        Raises:
            CheckpointCorrupt: bytes are not what the manifest promises.
        """
        found = await self.get(job_id, checkpoint)
        files = await self.manifest(job_id, found.id)
        for file in files:
            # Hashing what is here already reads whole files.
            landing = await asyncio.to_thread(Landing, Path(folder), file)
            await self._fetch(calls.checkpoint_file(job_id, found.id, file.path), landing)
        return files

    async def _fetch(self, path: str, landing: Landing) -> None:
        for attempt in range(1, wire.ATTEMPTS + 1):
            if not landing.missing:
                break
            try:
                with landing:
                    async with self._client.stream(path, headers=landing.headers) as response:
                        if response.status_code != 206:
                            landing.restart()
                        async for chunk in response.aiter_bytes():
                            landing.write(chunk)
            except ServiceUnavailable:
                if attempt == wire.ATTEMPTS:
                    raise
                await asyncio.sleep(wire.pause_before(attempt))
        landing.finish()


class AsyncFiles:
    """`client.files`."""

    def __init__(self, client: AsyncTunery) -> None:
        self._client = client

    async def upload(self, path: str | Path, purpose: str = "fine-tune") -> File:
        """Upload a data file."""
        path = Path(path)
        return await self._client.upload(path, path.name, purpose)

    async def get(self, file_id: str) -> File:
        return await self._client.send(calls.get_file(file_id))

    async def validation(self, file_id: str) -> Mapping[str, Any] | None:
        """What was found in it: format, rows, problems; None where its purpose asks for none."""
        return await self._client.send(calls.file_validation(file_id))
