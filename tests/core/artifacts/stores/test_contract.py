"""The promises of `ArtifactStore`, held against every store.

A new store adds itself to `STORES`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.request
from typing import TYPE_CHECKING

import obstore
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from core.artifacts.stores import ArtifactStore, open_store
from core.settings import Settings
from tunery.errors import Conflict, InvalidConfig, NotFound, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

STORES = ("file", "s3")
MIB = 1 << 20
LARGE = 20 * MIB  # several parts on S3


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    # One request at a time: moto looks whether a key exists and writes it in two steps, which
    # threads come between. S3 itself promises one step.
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def s3_settings(endpoint: str, bucket: str) -> Settings:
    return Settings(
        store_url=f"s3://{bucket}/some/prefix",
        store_endpoint=endpoint,
        store_access_key_id="test",
        store_secret_access_key="test",
    )


def make_bucket(endpoint: str, name: str) -> None:
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "file":
        return open_store(Settings(store_url=(tmp_path / "store").as_uri()))
    endpoint = request.getfixturevalue("s3_endpoint")
    bucket = f"b{abs(hash(str(tmp_path)))}"
    make_bucket(endpoint, bucket)
    return open_store(s3_settings(endpoint, bucket))


@pytest.fixture
def leftovers(store: ArtifactStore, tmp_path: Path) -> Callable[[], list[str]]:
    """Everything in the store, also what its own listing would hide."""

    def look() -> list[str]:
        bucket = getattr(store, "_bucket", None)
        if bucket is not None:
            return [found["path"] for page in obstore.list(bucket) for found in page]
        return [str(path) for path in (tmp_path / "store").rglob("*") if not path.is_dir()]

    return look


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def pattern(size: int, step: int = MIB) -> AsyncIterator[bytes]:
    for start in range(0, size, step):
        yield bytes_at(start, min(step, size - start))


def bytes_at(start: int, length: int) -> bytes:
    """Content in which every place is told from every other one."""
    first = start // 8
    words = b"".join(number.to_bytes(8, "big") for number in range(first, first + length // 8 + 2))
    return words[start % 8 : start % 8 + length]


async def read(store: ArtifactStore, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in store.get(key, start, end)])


async def keys(store: ArtifactStore, prefix: str) -> list[str]:
    return sorted([key async for key in store.list(prefix)])


async def test_what_was_put_is_read_back(store: ArtifactStore) -> None:
    assert await store.put("a/b/c.bin", chunks(b"one", b"", b"two")) == 6
    assert await read(store, "a/b/c.bin") == b"onetwo"
    assert await store.size("a/b/c.bin") == 6


async def test_an_empty_artifact_exists(store: ArtifactStore) -> None:
    assert await store.put("empty", chunks()) == 0
    assert await store.size("empty") == 0
    assert await read(store, "empty") == b""


async def test_a_path_is_copied(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    assert await store.put("copy", source) == 7
    source.write_bytes(b"changed")
    assert await read(store, "copy") == b"content"


async def test_a_large_artifact_comes_back_whole(
    store: ArtifactStore, leftovers: Callable[[], list[str]]
) -> None:
    assert await store.put("large", pattern(LARGE)) == LARGE
    assert await store.size("large") == LARGE
    assert await read(store, "large") == bytes_at(0, LARGE)
    assert len(leftovers()) == 1


@pytest.mark.parametrize("size", [5, LARGE])
async def test_put_refuses_to_overwrite(store: ArtifactStore, size: int) -> None:
    await store.put("key", chunks(b"first"))
    with pytest.raises(Conflict) as caught:
        await store.put("key", pattern(size))
    assert caught.value.code == "already_exists"
    assert await read(store, "key") == b"first"


@pytest.mark.parametrize("size", [1000, 9_000_000])
async def test_of_concurrent_puts_exactly_one_wins(
    store: ArtifactStore, size: int, leftovers: Callable[[], list[str]]
) -> None:
    async def put(who: int) -> int | None:
        try:
            await store.put("raced", chunks(*[bytes([who]) * (size // 10)] * 10))
        except Conflict:
            return None
        return who

    winners = [who for who in await asyncio.gather(*map(put, range(6))) if who is not None]
    assert len(winners) == 1
    content = await read(store, "raced")
    assert content == bytes(winners) * size
    assert len(leftovers()) == 1


class Hiccup(Exception):
    pass


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("error", [Hiccup, OSError, asyncio.CancelledError])
async def test_a_put_whose_source_fails_leaves_nothing(
    store: ArtifactStore,
    size: int,
    error: type[BaseException],
    leftovers: Callable[[], list[str]],
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        async for chunk in pattern(size):
            yield chunk
        raise error

    with pytest.raises(error):
        await store.put("broken", broken())
    with pytest.raises(NotFound):
        await store.size("broken")
    assert leftovers() == []
    await store.put("broken", chunks(b"second try"))


async def test_a_cancelled_put_leaves_nothing(
    store: ArtifactStore, leftovers: Callable[[], list[str]]
) -> None:
    halfway = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        async for chunk in pattern(9 * MIB):
            yield chunk
        halfway.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(store.put("slow", slow()))
    await halfway.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await keys(store, "slow") == []
    assert leftovers() == []


async def test_a_killed_put_is_invisible_and_swept(store: ArtifactStore, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import asyncio, sys
        from core.artifacts.stores import open_store
        from core.settings import Settings

        async def half():
            yield b"x" * (9 << 20)
            print("half", flush=True)
            await asyncio.sleep(60)

        asyncio.run(open_store(Settings()).put("killed/key", half()))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment_of(store, tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert await keys(store, "killed") == []
    with pytest.raises(NotFound):
        await store.size("killed/key")
    assert await store.put("killed/key", chunks(b"again")) == 5
    await store.sweep(older_than_s=-60)
    assert await store.sweep(older_than_s=-60) == 0
    assert await read(store, "killed/key") == b"again"


def environment_of(store: ArtifactStore, tmp_path: Path) -> dict[str, str]:
    bucket = getattr(store, "_bucket", None)
    if bucket is None:
        return {"TUNERY_STORE_URL": (tmp_path / "store").as_uri()}
    config = bucket.config
    return {
        "TUNERY_STORE_URL": f"s3://{config['bucket']}/some/prefix",
        "TUNERY_STORE_ENDPOINT": config["endpoint"],
        "TUNERY_STORE_ACCESS_KEY_ID": "test",
        "TUNERY_STORE_SECRET_ACCESS_KEY": "test",
    }


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 10),
        (5, 6),
        (MIB - 1, MIB + 1),
        (3 * MIB, None),
        (0, None),
        (7, 7),
        (3 * MIB + 99, 10**9),
    ],
)
async def test_a_range_is_exactly_its_bytes(
    store: ArtifactStore, start: int, end: int | None
) -> None:
    size = 3 * MIB + 100
    await store.put("ranged", pattern(size))
    expected = bytes_at(0, size)[start:end]
    assert await read(store, "ranged", start, end) == expected


async def test_a_range_beyond_the_end_is_empty(store: ArtifactStore) -> None:
    await store.put("short", chunks(b"abc"))
    assert await read(store, "short", 3) == b""
    assert await read(store, "short", 10, 20) == b""


async def test_a_missing_key_is_not_found(store: ArtifactStore) -> None:
    await store.put("there/below", chunks(b""))
    for key in ("absent", "there", "there/below/it"):
        with pytest.raises(NotFound):
            await store.size(key)
        with pytest.raises(NotFound):
            await read(store, key)
        with pytest.raises(NotFound):
            await read(store, key, 1, 1)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a/./b",
        "a//b",
        "a//",
        ".incoming/x",
        "a/.hidden",
        "a\\b",
        "a\0b",
        "a\nb",
        "%2e%2e/up",
        "a/%2e%2e",
        "é",
        "x" * 300,
        "/".join(["x" * 200] * 5),
    ],
)
async def test_traversal_is_refused_everywhere(store: ArtifactStore, key: str) -> None:
    for attempt in (
        store.put(key, chunks(b"evil")),
        store.size(key),
        read(store, key),
        store.delete(key),
        store.delete_prefix(key),
        keys(store, key),
    ):
        with pytest.raises(InvalidConfig) as caught:
            await attempt
        assert caught.value.code == "invalid_key"


async def test_listing_is_scoped_to_the_folder(store: ArtifactStore) -> None:
    for key in ("jobs/a/1", "jobs/a/x/2", "jobs/ab/3", "jobs/b", "other"):
        await store.put(key, chunks(b"."))
    assert await keys(store, "jobs/a") == ["jobs/a/1", "jobs/a/x/2"]
    assert await keys(store, "jobs") == ["jobs/a/1", "jobs/a/x/2", "jobs/ab/3", "jobs/b"]
    assert await keys(store, "nothing") == []
    assert await keys(store, "jobs/a/none") == []


async def test_deleting_removes_one_key_and_may_be_repeated(store: ArtifactStore) -> None:
    await store.put("d/one", chunks(b"1"))
    await store.put("d/two", chunks(b"2"))
    await store.delete("d/one")
    await store.delete("d/one")
    await store.delete("never/was")
    assert await keys(store, "d") == ["d/two"]
    await store.put("d/one", chunks(b"new"))
    assert await read(store, "d/one") == b"new"


async def test_deleting_a_folder_spares_its_neighbours(store: ArtifactStore) -> None:
    for key in ("p/a/1", "p/a/deep/er/2", "p/ab/3"):
        await store.put(key, chunks(b"."))
    assert await store.delete_prefix("p/a") == 2
    assert await store.delete_prefix("p/a") == 0
    assert await keys(store, "p") == ["p/ab/3"]
    await store.put("p/a/1", chunks(b"again"))
    assert await keys(store, "p/a/") == ["p/a/1"]
    assert await store.delete_prefix("p/a/") == 1


async def test_ping_answers(store: ArtifactStore) -> None:
    await store.ping()


async def test_a_reader_that_stops_early_harms_nothing(store: ArtifactStore) -> None:
    await store.put("long", pattern(4 * MIB))
    stream = store.get("long")
    assert len(await anext(stream)) > 0
    await stream.aclose()  # type: ignore[attr-defined]
    assert await store.size("long") == 4 * MIB


async def test_an_unreachable_store_says_so() -> None:
    store = open_store(s3_settings("http://127.0.0.1:1", "nowhere"))
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.ping(), 90)


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig) as caught:
        open_store(Settings(store_url="ftp://host/folder"))
    assert "file://" in str(caught.value.hint)
    assert "s3://" in str(caught.value.hint)
