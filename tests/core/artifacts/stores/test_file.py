"""What only a disk can do to a store: links, full disks, durability."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from core.artifacts.stores import open_store
from core.artifacts.stores.file import FileStore
from core.settings import Settings
from tunery.errors import InvalidConfig, NotFound, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


async def one(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def test_a_symlink_is_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"of another tenant")
    store = FileStore(tmp_path / "store")
    await store.put("mine/real", one(b"x"))
    (tmp_path / "store/mine/link").symlink_to(secret)
    (tmp_path / "store/away").symlink_to(tmp_path)

    for key in ("mine/link", "away/secret"):
        with pytest.raises(NotFound):
            await store.size(key)
    assert [key async for key in store.list("mine")] == ["mine/real"]
    with pytest.raises(StoreUnavailable):
        await store.put("away/planted", one(b"x"))
    assert not (tmp_path / "planted").exists()
    await store.delete_prefix("mine")
    assert secret.read_bytes() == b"of another tenant"


async def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    store = FileStore(tmp_path)
    await store.ping()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable) as caught:
        await store.put("key", one(b"x"))
    assert caught.value.code == "artifact_store_full"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_bytes_and_name_are_synced_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    await store.put("folder/first", one(b"x"))
    happened: list[str] = []
    sync, link = os.fsync, os.link

    def noted_sync(fd: int) -> None:
        happened.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "bytes")
        sync(fd)

    def noted_link(*args: object, **named: object) -> None:
        happened.append("link")
        link(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "link", noted_link)
    await store.put("folder/second", one(b"x"))
    assert happened == ["bytes", "link", "folder"]


@pytest.mark.parametrize("url", ["file://host/folder", "file:relative"])
def test_a_url_that_is_no_local_folder_is_refused(url: str) -> None:
    with pytest.raises(InvalidConfig):
        open_store(Settings(store_url=url))
