"""Bytes on their way into the store: counted, hashed and validated as they pass, never held.

Files of lines are validated as they arrive. CSV and Parquet are also written to a temporary file,
which a process of its own then looks at: their decoders are not to be trusted with strangers' data.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from tunery.data.validate import LINE_SUFFIXES, Report, Validator
from tunery.errors import AppError, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

    from core.artifacts.stores import ArtifactStore

PIECE_BYTES = 1 << 18
VALIDATION_PATIENCE_S = 3600.0

log = structlog.get_logger(__name__)


class Received:
    """What arrived, and lies in the store under `key`.

    Attributes:
        report: of the validation; None where none was asked for.
    """

    def __init__(self, key: str, suffix: str | None, limit_bytes: int, limit_code: str) -> None:
        self.key = key
        self.size_bytes = 0
        self.report: Report | None = None
        self._suffix = suffix
        self._limit_bytes, self._limit_code = limit_bytes, limit_code
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        lines = suffix in LINE_SUFFIXES
        self._validator = Validator(suffix) if suffix and lines else None
        self._spool = (
            tempfile.NamedTemporaryFile(prefix="tunery-")  # noqa: SIM115 - closed by `receive`
            if suffix and not lines
            else None
        )
        self._kept = False

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def md5(self) -> str:
        return self._md5.hexdigest()

    def keep(self) -> None:
        """Leave it in the store: a committed row names it."""
        self._kept = True

    async def _pass(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        held = bytearray()
        async for chunk in chunks:
            self.size_bytes += len(chunk)
            if self.size_bytes > self._limit_bytes:
                raise TooLarge(
                    f"more than {self._limit_bytes} bytes", code=self._limit_code, param="file"
                )
            held += chunk
            if len(held) >= PIECE_BYTES:
                piece = bytes(held)
                held.clear()
                await asyncio.to_thread(self._look, piece)
                yield piece
        if held:
            await asyncio.to_thread(self._look, bytes(held))
            yield bytes(held)

    def _look(self, piece: bytes) -> None:
        self._sha256.update(piece)
        self._md5.update(piece)
        if self._validator is not None:
            self._validator.feed(piece)
        if self._spool is not None:
            self._spool.write(piece)

    async def _judge(self) -> None:
        if self._validator is not None:
            self.report = await asyncio.to_thread(self._validator.finish)
        elif self._spool is not None and self._suffix is not None:
            await asyncio.to_thread(self._spool.flush)
            self.report = await _validate_apart(Path(self._spool.name), self._suffix)

    def _close(self) -> None:
        if self._spool is not None:
            self._spool.close()


@contextlib.asynccontextmanager
async def receive(
    store: ArtifactStore,
    key: str,
    chunks: AsyncIterable[bytes],
    *,
    limit_bytes: int,
    limit_code: str = "file_too_large",
    suffix: str | None = None,
) -> AsyncIterator[Received]:
    """Put a stream into the store; at the end of the block it is removed, unless it was kept.

    Args:
        suffix: validate it as such a file; None: do not.

    Raises:
        TooLarge: more than `limit_bytes` arrive.
        StoreUnavailable: the store does not take it.
    """
    received = Received(key, suffix, limit_bytes, limit_code)
    try:
        await store.put(key, received._pass(chunks))
        try:
            await received._judge()
            yield received
        finally:
            if not received._kept:
                await _discard(store, key)
    finally:
        received._close()


async def _discard(store: ArtifactStore, key: str) -> None:
    try:
        await asyncio.shield(store.delete(key))
    except AppError as error:  # what failed first is what the caller is told
        log.warning("artifact.not_discarded", key=key, error=str(error))


async def _validate_apart(path: Path, suffix: str) -> Report:
    """`tunery.data.validate` in a process of its own, without our settings and secrets."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tunery.data.validate",
        str(path),
        suffix,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")},
    )
    try:
        async with asyncio.timeout(VALIDATION_PATIENCE_S):
            printed, _ = await process.communicate()
    except TimeoutError:
        printed = b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        log.warning("validation.died", suffix=suffix, returncode=process.returncode)
        return _undecided(suffix)
    return Report.from_json(json.loads(printed))


def _undecided(suffix: str) -> Report:
    code = f"bad_{suffix.removeprefix('.')}"
    problem = {
        "line": None,
        "path": None,
        "code": code,
        "severity": "error",
        "message": "reading the file took more memory or time than a file may take",
    }
    return Report(problems=[problem], problem_counts={code: 1}, valid=False)
