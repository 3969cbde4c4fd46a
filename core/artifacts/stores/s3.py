"""Artifacts in an S3-compatible bucket: `s3://bucket/prefix`.

A put of up to 8 MiB is one conditional request. A larger one is a multipart upload under a
temporary key, which S3 then copies to its own key on condition that this does not exist yet:
conditional and multipart exclude each other in one request of obstore's. The copy is S3's own
work, and bounds what can be created in one piece.
"""

from __future__ import annotations

import contextlib
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import S3Store as Bucket

from core.artifacts.stores import (
    CHUNK_BYTES,
    INCOMING,
    ArtifactStore,
    folder_segments,
    missing,
    segments,
)
from tunery.errors import Conflict, StoreUnavailable, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterator
    from urllib.parse import SplitResult

    from obstore import GetOptions
    from pydantic import SecretStr

    from core.settings import Settings

SMALL_BYTES = 8 << 20
PART_BYTES = 16 << 20
"""Of a multipart upload: S3 allows 10,000 parts."""
PARTS_AT_ONCE = 2
COPY_LIMIT_BYTES = 5 << 30
"""S3 copies no more than this at once."""


def open(url: SplitResult, settings: Settings) -> ArtifactStore:
    """A store in the URL's bucket, below its path. Without keys, the machine's own role is used."""

    def reveal(secret: SecretStr | None) -> str | None:
        return None if secret is None else secret.get_secret_value()

    given = {
        "endpoint": settings.store_endpoint,
        "access_key_id": reveal(settings.store_access_key_id),
        "secret_access_key": reveal(settings.store_secret_access_key),
    }
    bucket = Bucket(
        url.netloc,
        prefix=url.path.strip("/") or None,
        region=settings.store_region,
        copy_if_not_exists="multipart",
        client_options={
            "allow_http": (settings.store_endpoint or "").startswith("http://"),
            "timeout": timedelta(minutes=5),
            "connect_timeout": timedelta(seconds=5),
        },
        retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)},
        **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    return S3Store(bucket)


class S3Store:
    """Keys are objects of one bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def put(self, key: str, data: AsyncIterable[bytes] | Path) -> int:
        segments(key)
        source = _read(data) if isinstance(data, Path) else aiter(data)
        head = bytearray()
        async for chunk in source:
            head += chunk
            if len(head) > SMALL_BYTES:
                return await self._put_large(key, bytes(head), source)
        with _explained(key):
            await obstore.put_async(
                self._bucket, key, bytes(head), mode="create", use_multipart=False
            )
        return len(head)

    async def _put_large(self, key: str, head: bytes, rest: AsyncIterator[bytes]) -> int:
        draft = f"{INCOMING}/{secrets.token_hex(16)}"
        counted = _Counted(head, rest)
        try:
            with _explained(key):
                try:
                    await obstore.put_async(
                        self._bucket,
                        draft,
                        counted.chunks(),
                        use_multipart=True,
                        chunk_size=PART_BYTES,
                        max_concurrency=PARTS_AT_ONCE,
                    )
                except BaseException:
                    if counted.error is not None:
                        raise counted.error from None
                    raise
                await obstore.copy_async(self._bucket, draft, key, overwrite=False)
        finally:
            with contextlib.suppress(BaseError, FileNotFoundError):
                await obstore.delete_async(self._bucket, draft)
        return counted.size

    async def get(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        segments(key)
        if end is not None and end <= start:
            await self.size(key)
            return
        options: GetOptions = {}
        if end is not None:
            options = {"range": (start, end)}
        elif start:
            options = {"range": {"offset": start}}
        with _explained(key):
            if start and start >= await self.size(key):
                return
            got = await obstore.get_async(self._bucket, key, options=options)
        stream = aiter(got.stream(min_chunk_size=CHUNK_BYTES))
        while True:
            with _explained(key):
                chunk = await anext(stream, None)
            if chunk is None:
                return
            yield bytes(chunk)

    async def size(self, key: str) -> int:
        segments(key)
        with _explained(key):
            return int((await obstore.head_async(self._bucket, key))["size"])

    async def list(self, prefix: str) -> AsyncIterator[str]:
        folder = "/".join(folder_segments(prefix))
        stream = aiter(obstore.list(self._bucket, folder))
        while True:
            with _explained(folder):
                page = await anext(stream, None)
            if page is None:
                return
            for found in page:
                yield found["path"]

    async def delete(self, key: str) -> None:
        segments(key)
        with _explained(key), contextlib.suppress(NotFoundError, FileNotFoundError):
            await obstore.delete_async(self._bucket, key)

    async def delete_prefix(self, prefix: str) -> int:
        keys = [key async for key in self.list(prefix)]
        if keys:
            with _explained(prefix):
                await obstore.delete_async(self._bucket, keys)
        return len(keys)

    async def sweep(self, older_than_s: float) -> int:
        """Multipart uploads that never ended are invisible here: the bucket's own lifecycle rule
        aborts those (see `docs/`)."""
        limit = datetime.now(UTC) - timedelta(seconds=older_than_s)
        old: list[str] = []
        with _explained(INCOMING):
            async for page in obstore.list(self._bucket, INCOMING):
                old += [found["path"] for found in page if found["last_modified"] < limit]
            if old:
                await obstore.delete_async(self._bucket, old)
        return len(old)

    async def ping(self) -> None:
        with _explained(INCOMING):
            await obstore.list_with_delimiter_async(self._bucket, INCOMING)


class _Counted:
    """The bytes of a large put, counted, and the error that ended them, kept.

    obstore reports a failing source as an error of its own; the caller's must come through.
    """

    def __init__(self, head: bytes, rest: AsyncIterator[bytes]) -> None:
        self._head, self._rest = head, rest
        self.size = 0
        self.error: BaseException | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            self.size += len(self._head)
            yield self._head
            async for chunk in self._rest:
                self.size += len(chunk)
                if self.size > COPY_LIMIT_BYTES:
                    raise TooLarge(
                        f"S3 creates at most {COPY_LIMIT_BYTES} bytes in one piece",
                        code="artifact_too_large",
                        hint="save a large model in several files",
                    )
                yield chunk
        except BaseException as error:
            self.error = error
            raise


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


@contextlib.contextmanager
def _explained(key: str) -> Iterator[None]:
    """Turn what obstore says into our words. Its texts name buckets and requests: they stay in
    the cause."""
    try:
        yield
    except (AlreadyExistsError, PreconditionError) as error:
        raise Conflict(f"{key} exists", code="already_exists") from error
    except (NotFoundError, FileNotFoundError) as error:
        raise missing(key) from error
    except BaseError as error:
        raise StoreUnavailable("the artifact store does not answer as it should") from error
