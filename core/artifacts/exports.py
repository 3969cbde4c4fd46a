"""Exports as their owners get them: single files by public path, and one deterministic archive.

Only what lies under `export/` of a checkpoint is ever named here. The resume half holds pickles
and the service's own bookkeeping.
"""

from __future__ import annotations

import tarfile
import zlib
from typing import TYPE_CHECKING, Any

from core.db.job_edits import mark_export_deleted
from core.jobs.view import EXPORT, export_files
from tunery.errors import InvalidConfig, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from core.artifacts.stores import ArtifactStore
    from core.db.engine import Database
    from core.db.views import Model

BLOCK = 512
GZIP_FRAMING = 31  # zlib's code for a gzip header, whose mtime it leaves at zero


def find_file(manifest: Iterable[Mapping[str, Any]], path: str) -> dict[str, Any]:
    """The manifest's entry of a public path. What is not in the manifest is not there.

    Raises:
        InvalidConfig: a path that tries to climb.
        NotFound: no such file in the export.
    """
    parts = path.split("/")
    if "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise InvalidConfig("not a path inside a checkpoint", code="invalid_path", param="path")
    for file in export_files(manifest):
        if file["path"] == path:
            return file
    raise NotFound(f"the checkpoint has no file {path[:200]!r}", code="file_not_found")


def store_key(prefix: str, path: str) -> str:
    """Where the bytes of a public path lie."""
    return f"{prefix.rstrip('/')}/{EXPORT}{path}"


def tar_size(files: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of the uncompressed archive of these files."""
    return sum(BLOCK + _padded(file["bytes"]) for file in files) + 2 * BLOCK


async def tar(
    store: ArtifactStore, prefix: str, files: Sequence[Mapping[str, Any]]
) -> AsyncIterator[bytes]:
    """A tar of these files: the same bytes each time, read from the store as they are sent."""
    for file in files:
        header = tarfile.TarInfo(file["path"])
        header.size = file["bytes"]
        header.mode = 0o644
        yield header.tobuf(tarfile.USTAR_FORMAT)
        async for chunk in store.get(store_key(prefix, file["path"])):
            yield chunk
        yield bytes(_padded(file["bytes"]) - file["bytes"])
    yield bytes(2 * BLOCK)


async def gzipped(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same, compressed. Level 1: weights hardly shrink, and somebody waits."""
    squeeze = zlib.compressobj(1, zlib.DEFLATED, GZIP_FRAMING)
    async for chunk in chunks:
        if packed := squeeze.compress(chunk):
            yield packed
    yield squeeze.flush()


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


async def delete_export(db: Database, store: ArtifactStore, model: Model) -> None:
    """Take a model out of every listing, then its files out of the store, the resume half too.

    The mark comes first: a crash between the two leaves bytes that nobody can see, not a model
    that cannot be loaded. Nothing resumes from a checkpoint with that mark.
    """
    async with db.begin() as session:
        await mark_export_deleted(session, model.checkpoint_id)
    await store.delete_prefix(model.prefix)
