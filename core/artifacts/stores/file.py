"""Artifacts in a folder: `file:///var/lib/tunery/artifacts`.

Our own code, not obstore's local store, which neither syncs what it writes (a power cut may leave
a short file under its final name) nor refuses symlinks on the way to it.

A put writes a temporary file, syncs it, links it to its name (a rename would silently replace) and
syncs the folder. Folders are opened one by one, never following a symlink, and everything below
happens relative to their descriptors: whoever swaps a folder for a link changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote

from core.artifacts.stores import (
    CHUNK_BYTES,
    INCOMING,
    ArtifactStore,
    folder_segments,
    missing,
    segments,
)
from tunery.errors import Conflict, InvalidConfig, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
    from urllib.parse import SplitResult

    from core.settings import Settings

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_RACES = 16
"""Times that a put may find its folder removed under it by a `delete_prefix`."""


def open(url: SplitResult, settings: Settings) -> ArtifactStore:
    """A store below the URL's path.

    Raises:
        InvalidConfig: the URL names another host, or no absolute path.
    """
    path = unquote(url.path)
    if url.netloc not in ("", "localhost") or not path.startswith("/"):
        raise InvalidConfig(
            "a local artifact store is named by an absolute path",
            hint="file:///folder has three slashes",
            param="store_url",
        )
    return FileStore(Path(path))


class FileStore:
    """Keys are paths below `root`, which is made when it is first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def put(self, key: str, data: AsyncIterable[bytes] | Path) -> int:
        parts = segments(key)
        with _explained():
            draft = await asyncio.to_thread(_Draft, self.root)
            try:
                size = await _fill(draft, data)
                await asyncio.to_thread(draft.publish, self.root, parts)
            finally:
                await asyncio.shield(asyncio.to_thread(draft.discard))
        return size

    async def get(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        file = await asyncio.to_thread(self._open, key)
        try:
            left = None if end is None else max(0, end - start)
            with _explained():
                await asyncio.to_thread(file.seek, start)
            while left is None or left > 0:
                want = CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)
                with _explained():
                    chunk = await asyncio.to_thread(file.read, want)
                if not chunk:
                    return
                if left is not None:
                    left -= len(chunk)
                yield chunk
        finally:
            file.close()

    async def size(self, key: str) -> int:
        def measure() -> int:
            with self._open(key) as file:
                return os.fstat(file.fileno()).st_size

        return await asyncio.to_thread(measure)

    async def list(self, prefix: str) -> AsyncIterator[str]:
        for key in await asyncio.to_thread(self._list, folder_segments(prefix)):
            yield key

    async def delete(self, key: str) -> None:
        parts = segments(key)

        def remove() -> None:
            with (
                _explained(),
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                _folder(self.root, parts[:-1]) as folder,
            ):
                os.unlink(parts[-1], dir_fd=folder)
                os.fsync(folder)

        await asyncio.to_thread(remove)

    async def delete_prefix(self, prefix: str) -> int:
        parts = folder_segments(prefix)

        def remove() -> int:
            with _explained():
                return _remove_tree(self.root, parts)

        return await asyncio.to_thread(remove)

    async def sweep(self, older_than_s: float) -> int:
        def remove() -> int:
            count = 0
            with (
                _explained(),
                contextlib.suppress(FileNotFoundError),
                _folder(self.root, [INCOMING]) as folder,
            ):
                for name in os.listdir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        age_s = time.time() - os.stat(name, dir_fd=folder).st_mtime
                        if age_s > older_than_s:
                            os.unlink(name, dir_fd=folder)
                            count += 1
            return count

        return await asyncio.to_thread(remove)

    async def ping(self) -> None:
        def probe() -> None:
            with _explained(), _folder(self.root, [INCOMING], create=True):
                pass

        await asyncio.to_thread(probe)

    def _open(self, key: str) -> BinaryIO:
        parts = segments(key)
        with _explained():
            try:
                with _folder(self.root, parts[:-1]) as folder:
                    fd = os.open(parts[-1], _READ, dir_fd=folder)
            except (FileNotFoundError, NotADirectoryError):
                raise missing(key) from None
            except OSError as error:
                if error.errno == errno.ELOOP:  # a symlink is nothing that we wrote
                    raise missing(key) from None
                raise
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise missing(key)
            return os.fdopen(fd, "rb")

    def _list(self, parts: Sequence[str]) -> Sequence[str]:
        with _explained():
            try:
                with _folder(self.root, parts) as folder:
                    return [
                        "/".join([*parts, *below, name])
                        for below, names, _ in _walk(folder)
                        for name in names
                    ]
            except (FileNotFoundError, NotADirectoryError):
                return []


class _Draft:
    """A file that nobody sees until `publish`."""

    def __init__(self, root: Path) -> None:
        self._folder = _open_folder(root, [INCOMING], create=True)
        self._name = f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self.file = os.fdopen(os.open(self._name, _NEW, 0o600, dir_fd=self._folder), "wb")
        except BaseException:
            os.close(self._folder)
            raise

    def publish(self, root: Path, parts: list[str]) -> None:
        """Make it durable, then visible under its name, then make the name durable."""
        self.file.flush()
        os.fsync(self.file.fileno())
        for race in range(_RACES):
            try:
                with _folder(root, parts[:-1], create=True) as folder:
                    os.link(
                        self._name,
                        parts[-1],
                        src_dir_fd=self._folder,
                        dst_dir_fd=folder,
                        follow_symlinks=False,
                    )
                    os.fsync(folder)
                return
            except FileExistsError:
                raise Conflict(f"{'/'.join(parts)} exists", code="already_exists") from None
            except FileNotFoundError:
                if race == _RACES - 1:
                    raise

    def discard(self) -> None:
        """Remove the temporary name; the published one, if any, stays."""
        try:
            self.file.close()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._folder)
            os.close(self._folder)


async def _fill(draft: _Draft, data: AsyncIterable[bytes] | Path) -> int:
    size = 0
    if isinstance(data, Path):
        return await asyncio.to_thread(_copy, data, draft.file)
    async for chunk in _foreign(data):
        await asyncio.to_thread(draft.file.write, chunk)
        size += len(chunk)
    return size


async def _foreign(data: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The caller's chunks; an OSError of theirs is not ours to explain."""
    try:
        async for chunk in data:
            yield chunk
    except OSError as error:
        raise _Foreign(error) from error


class _Foreign(Exception):
    """Carries an OSError of the caller's past `_explained`."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


def _copy(source: Path, target: BinaryIO) -> int:
    size = 0
    with source.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            target.write(chunk)
            size += len(chunk)
    return size


def _open_folder(root: Path, parts: Sequence[str], *, create: bool = False) -> int:
    """A descriptor of a folder below `root`, reached without following any link there."""
    if create:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            fd = _step(fd, part, create)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _step(parent: int, name: str, create: bool) -> int:
    """Descend; closes `parent` when that succeeds."""
    if create:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            os.fsync(parent)
        except FileExistsError:
            pass
    child = os.open(name, _FOLDER, dir_fd=parent)
    os.close(parent)
    return child


@contextlib.contextmanager
def _folder(root: Path, parts: Sequence[str], *, create: bool = False) -> Iterator[int]:
    fd = _open_folder(root, parts, create=create)
    try:
        yield fd
    finally:
        os.close(fd)


def _walk(folder: int) -> Iterator[tuple[list[str], list[str], int]]:
    """(path below, files, descriptor) of each folder, deepest first. Links are neither."""
    for top, _, names, fd in os.fwalk(".", topdown=False, dir_fd=folder, follow_symlinks=False):
        below = [part for part in top.split("/") if part != "."]
        yield below, [name for name in names if _is_entry(name, fd)], fd


def _is_entry(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:  # deleted since the folder was read
        return False


def _remove_tree(root: Path, parts: list[str]) -> int:
    count = 0
    try:
        with _folder(root, parts) as folder:
            for below, names, fd in _walk(folder):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=fd)
                        count += 1
                if below:
                    # Not empty any more: somebody wrote into it meanwhile.
                    with contextlib.suppress(OSError), _folder(root, [*parts, *below[:-1]]) as up:
                        os.rmdir(below[-1], dir_fd=up)
        with contextlib.suppress(OSError), _folder(root, parts[:-1]) as up:
            os.rmdir(parts[-1], dir_fd=up)
    except (FileNotFoundError, NotADirectoryError):
        pass
    return count


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what the disk says into our words."""
    try:
        yield
    except _Foreign as foreign:
        raise foreign.error from foreign.error.__cause__
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreUnavailable(
            f"the artifact store's disk says: {os.strerror(error.errno or errno.EIO).lower()}",
            code="artifact_store_full" if full else None,
            hint="free space where TUNERY_STORE_URL points" if full else None,
        ) from error
