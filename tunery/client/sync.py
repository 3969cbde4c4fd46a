"""The client: `with Tunery() as client: job = client.jobs.create(...)`."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from tunery.client import calls, credentials, sse, wire
from tunery.client.download import Landing
from tunery.client.objects import Checkpoint, Event, File, Job, ManifestFile, Metrics
from tunery.errors import ServiceUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

T = TypeVar("T")

HOLD_S = 20
"""How long one look at a job may be held until its status changes."""
SILENCE_S = 60.0
"""Silence on an event stream after which it is taken for dead: four missed keep-alives."""
GIVE_UP_S = 300.0
"""How long a broken event stream is tried again."""


class Tunery:
    """Talks to one service.

    Args:
        api_key: and `base_url`: by default TUNERY_API_KEY and TUNERY_BASE_URL, then what `tunery
            login` stored, then the service that `tunery up` runs on this machine.
        transport: for tests.

    Every method raises the error that the service raised, by class and `code` (`tunery.errors`);
    `ServiceUnavailable` when there is no answer.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        found = credentials.find(base_url, api_key)
        self.base_url = found.base_url
        self._http = httpx2.Client(
            base_url=found.base_url,
            headers=wire.headers(found.api_key),
            timeout=httpx2.Timeout(wire.READ_TIMEOUT_S, connect=wire.CONNECT_TIMEOUT_S),
            trust_env=not wire.is_loopback(found.base_url),
            transport=transport,
        )
        self.jobs = Jobs(self)
        self.checkpoints = Checkpoints(self)
        self.files = Files(self)
        self.workers = Workers(self)

    def __enter__(self) -> Tunery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """Base models that can be trained, and what training made."""
        return self.send(calls.list_models())

    def version(self) -> dict[str, Any]:
        """The service's version."""
        return self.send(calls.version())

    def send(self, call: wire.Call[T]) -> T:
        """Make a call; what is safe to repeat is repeated when the service is away for a moment."""
        attempts = wire.ATTEMPTS if call.repeatable else 1
        for attempt in range(1, attempts + 1):
            try:
                return call.parse(self._once(call))
            except ServiceUnavailable:
                if attempt == attempts:
                    raise
                time.sleep(wire.pause_before(attempt))
        raise AssertionError("the last attempt returns or raises")

    def _once(self, call: wire.Call[Any]) -> Any:
        try:
            response = self._http.request(
                call.method,
                call.path,
                params=dict(call.params),
                json=call.json,
                headers=dict(call.headers),
            )
        except httpx2.TransportError as error:
            raise wire.unreachable(self.base_url, error) from error
        return wire.checked(response).json()

    @contextmanager
    def stream(self, path: str, **options: Any) -> Iterator[httpx2.Response]:
        """A response whose body is read as it comes."""
        try:
            with self._http.stream("GET", path, **options) as response:
                if not response.is_success:
                    response.read()
                yield wire.checked(response)
        except httpx2.TransportError as error:
            raise wire.unreachable(self.base_url, error) from error

    def pages(self, call: Callable[[str | None], wire.Call[dict[str, Any]]]) -> Iterator[Any]:
        """Every row of a list, a page at a time."""
        after: str | None = None
        while True:
            page = self.send(call(after))
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def upload(self, path: Path, name: str, purpose: str) -> File:
        """Send a file as it is read; memory stays flat."""
        try:
            with path.open("rb") as stream:
                response = self._http.post(
                    "/v1/files",
                    data={"purpose": purpose},
                    files={"file": (name, stream)},
                    timeout=httpx2.Timeout(None, connect=wire.CONNECT_TIMEOUT_S),
                )
        except httpx2.TransportError as error:
            raise wire.unreachable(self.base_url, error) from error
        return File.model_validate(wire.checked(response).json())


class Jobs:
    """`client.jobs`."""

    def __init__(self, client: Tunery) -> None:
        self._client = client

    def create(self, **body: Any) -> Job:
        """Create a job from the members of the create request; safe to repeat."""
        return self._client.send(calls.create_job(body))

    def dry_run(self, **body: Any) -> dict[str, Any]:
        """What creating it would do: resolved values, problems, warnings, estimate."""
        return self._client.send(calls.dry_run(body))

    def get(self, job_id: str) -> Job:
        return self._client.send(calls.get_job(job_id))

    def list(self, **filters: Any) -> Iterator[Job]:
        """Newest first; filters are `status`, `model`, `method`, `created_after`, ..."""
        rows = self._client.pages(lambda after: calls.list_jobs(after, filters))
        return map(Job.model_validate, rows)

    def cancel(self, job_id: str) -> Job:
        return self._client.send(calls.move_job(job_id, "cancel"))

    def pause(self, job_id: str) -> Job:
        return self._client.send(calls.move_job(job_id, "pause"))

    def resume(self, job_id: str) -> Job:
        return self._client.send(calls.move_job(job_id, "resume"))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it is done.

        Raises:
            WaitTimeout: it is not, after `timeout_s`; the job goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = HOLD_S if deadline is None else min(HOLD_S, deadline - time.monotonic())
            job = self._client.send(calls.get_job(job_id, max(0, int(left))))
            if job.done:
                return job
            if deadline is not None and time.monotonic() >= deadline:
                raise wire.WaitTimeout(f"job {job_id} is {job.status} after {timeout_s:g} s")
            time.sleep(0.2)

    def events(self, job_id: str, after: str | None = None) -> Iterator[Event]:
        """All events so far, oldest first, behind the one with the id `after`."""
        rows = self._client.pages(lambda cursor: calls.list_events(job_id, cursor or after))
        return map(Event.model_validate, rows)

    def follow(
        self, job_id: str, after: str | None = None, timeout_s: float | None = None
    ) -> Iterator[Event]:
        """All events, those to come included, until the job is done or `timeout_s` is over.

        A broken connection is taken up again where it broke.

        Raises:
            ServiceUnavailable: the service stays away for five minutes.
        """
        parser = sse.Parser()
        parser.last_id = after
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        away_since: float | None = None
        attempt = 0
        while True:
            silence_s = SILENCE_S if deadline is None else deadline - time.monotonic()
            if silence_s <= 0:
                return
            try:
                for event in self._stream_once(job_id, parser, min(silence_s, SILENCE_S)):
                    if event is None:
                        return
                    away_since, attempt = None, 0
                    yield event
            except ServiceUnavailable:
                if deadline is not None and time.monotonic() >= deadline:
                    return
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > GIVE_UP_S:
                    raise
            attempt = min(attempt + 1, 5)
            time.sleep(wire.pause_before(attempt))

    def _stream_once(
        self, job_id: str, parser: sse.Parser, silence_s: float
    ) -> Iterator[Event | None]:
        """Events of one connection; None for the end of the job."""
        parser.reset()
        path = calls.job_path(job_id, "events", "stream")
        limits = httpx2.Timeout(silence_s, connect=wire.CONNECT_TIMEOUT_S)
        with self._client.stream(path, headers=parser.headers, timeout=limits) as response:
            for line in response.iter_lines():
                message = parser.feed(line)
                if message is not None:
                    yield None if message.data == "[DONE]" else calls.event_of(message.data)

    def metrics(
        self, job_id: str, keys: Sequence[str] | None = None, resolution: int | None = None
    ) -> Metrics:
        """Logged points; `resolution` thins them to that many buckets."""
        return self._client.send(calls.metrics(job_id, keys, resolution))

    def metrics_csv(self, job_id: str) -> str:
        """All points as CSV, one line a step."""
        with self._client.stream(
            calls.job_path(job_id, "metrics"), params={"format": "csv"}
        ) as response:
            return response.read().decode()

    def logs(self, job_id: str, tail: int = 200, after: str | None = None) -> tuple[str, str]:
        """The trainer's output and the cursor behind it."""
        params = wire.given(tail=tail, after=after)
        with self._client.stream(calls.job_path(job_id, "logs"), params=params) as response:
            return response.read().decode(), response.headers.get("x-log-cursor", "0")


class Checkpoints:
    """`client.checkpoints`. A checkpoint is named by its id, `latest`, `best` or `step-<n>`."""

    def __init__(self, client: Tunery) -> None:
        self._client = client

    def list(self, job_id: str) -> Iterator[Checkpoint]:
        """Newest first."""
        rows = self._client.pages(lambda after: calls.list_checkpoints(job_id, after))
        return map(Checkpoint.model_validate, rows)

    def get(self, job_id: str, checkpoint: str = "latest") -> Checkpoint:
        return self._client.send(calls.get_checkpoint(job_id, checkpoint))

    def manifest(self, job_id: str, checkpoint: str = "latest") -> Sequence[ManifestFile]:
        return self._client.send(calls.manifest(job_id, checkpoint))

    def download(
        self,
        job_id: str,
        folder: str | Path,
        checkpoint: str = "latest",
        progress: Callable[[str, int, int], None] = lambda path, done, total: None,
    ) -> Sequence[ManifestFile]:
        """Download a checkpoint's files, each verified by its sha256; returns the manifest.

        Files that are here already are kept, half ones continued.

        Args:
            progress: told a file's path, bytes that are here, bytes in all.

        Raises:
            CheckpointCorrupt: bytes are not what the manifest promises.
        """
        found = self.get(job_id, checkpoint)
        files = self.manifest(job_id, found.id)
        for file in files:
            self._fetch(job_id, found.id, file, Path(folder), progress)
        return files

    def _fetch(
        self,
        job_id: str,
        checkpoint: str,
        file: ManifestFile,
        folder: Path,
        progress: Callable[[str, int, int], None],
    ) -> None:
        landing = Landing(folder, file)
        path = calls.checkpoint_file(job_id, checkpoint, file.path)
        for attempt in range(1, wire.ATTEMPTS + 1):
            if not landing.missing:
                break
            try:
                with (
                    landing,
                    self._client.stream(path, headers=landing.headers) as response,
                ):
                    if response.status_code != 206:
                        landing.restart()
                    for chunk in response.iter_bytes():
                        landing.write(chunk)
                        progress(file.path, landing.offset, file.bytes)
            except ServiceUnavailable:
                if attempt == wire.ATTEMPTS:
                    raise
                time.sleep(wire.pause_before(attempt))
        landing.finish()


class Files:
    """`client.files`."""

    def __init__(self, client: Tunery) -> None:
        self._client = client

    def upload(self, path: str | Path, purpose: str = "fine-tune") -> File:
        """Upload a data file.

        Raises:
            InvalidData: it cannot be trained on; `problems` has line numbers and codes.
        """
        path = Path(path)
        return self._client.upload(path, path.name, purpose)

    def get(self, file_id: str) -> File:
        return self._client.send(calls.get_file(file_id))

    def list(self) -> Iterator[File]:
        return map(File.model_validate, self._client.pages(calls.list_files))

    def validation(self, file_id: str) -> Mapping[str, Any] | None:
        """What was found in it: format, rows, problems; None where its purpose asks for none."""
        return self._client.send(calls.file_validation(file_id))

    def delete(self, file_id: str) -> None:
        self._client.send(calls.delete_file(file_id))


class Workers:
    """`client.workers`; needs an admin key."""

    def __init__(self, client: Tunery) -> None:
        self._client = client

    def list(self) -> Sequence[Mapping[str, Any]]:
        return self._client.send(calls.list_workers())

    def drain(self, worker_id: str, wanted: bool = True) -> Mapping[str, Any]:
        """Let a worker hand its jobs back and take no more; `wanted=False` undoes it."""
        return self._client.send(calls.drain_worker(worker_id, wanted))
