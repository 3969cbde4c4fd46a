"""Bytes under keys, behind one small protocol.

A store is a module of this package, named after its URL scheme, with
`open(url, settings) -> ArtifactStore`: adding one is adding one module, and its name to `STORES`
in the contract suite, which holds the promises below against every store.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from tunery.errors import InvalidConfig, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator
    from pathlib import Path

    from core.settings import Settings

CHUNK_BYTES = 1 << 20
"""What a store reads or hands out at once, about."""
INCOMING = ".incoming"
"""Where a put is written before it exists. No key begins like this."""
KEY_LIMIT = 900
"""Bytes; S3 takes 1024 with the store's own prefix."""

_SEGMENT = re.compile(r"[A-Za-z0-9_\-+=@,()][A-Za-z0-9_\-+=@,(). ]{0,254}")


class ArtifactStore(Protocol):
    """Bytes under keys. Knows nothing of jobs, JSON or tensors.

    Keys are relative and use "/"; no segment begins with a dot. A key, once written, is never
    rewritten. Every method raises `StoreUnavailable` when the store does not answer or is full,
    and `InvalidConfig` (`invalid_key`) for a key that is none.
    """

    async def put(self, key: str, data: AsyncIterable[bytes] | Path) -> int:
        """Write `data` so that readers see all of it or none; return its size in bytes.

        What `data` itself raises passes through, and nothing is left behind.

        Raises:
            Conflict: the key exists (`already_exists`). Of several puts of one key, one wins.
            TooLarge: more than the store can create in one piece.
        """
        ...

    def get(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, and without, `end`, in chunks of about 1 MiB.

        Raises:
            NotFound: no such key; on the first step of the iteration.
        """
        ...

    async def size(self, key: str) -> int:
        """Size in bytes.

        Raises:
            NotFound: no such key.
        """
        ...

    def list(self, prefix: str) -> AsyncIterator[str]:
        """Keys below the folder `prefix`, in no order. `jobs/a` does not contain `jobs/ab/c`."""
        ...

    async def delete(self, key: str) -> None:
        """Remove a key; one that is not there is gone already."""
        ...

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every key below the folder `prefix`; return how many there were."""
        ...

    async def sweep(self, older_than_s: float) -> int:
        """Remove what puts of dead processes left unfinished; return how many there were."""
        ...

    async def ping(self) -> None:
        """Raise `StoreUnavailable` unless the store answers."""
        ...


def open_store(settings: Settings) -> ArtifactStore:
    """The store that the settings name.

    Raises:
        InvalidConfig: no store has this URL's scheme.
    """
    url = urlsplit(settings.resolved_store_url())
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if url.scheme not in known:
        raise InvalidConfig(
            f"no artifact store has the scheme {url.scheme!r}",
            hint=f"known: {', '.join(f'{name}://' for name in known)}; set TUNERY_STORE_URL",
            param="store_url",
        )
    module = importlib.import_module(f"{__name__}.{url.scheme}")
    store: ArtifactStore = module.open(url, settings)
    return store


def segments(key: str) -> list[str]:
    """The parts of a key between its slashes.

    Raises:
        InvalidConfig: the key is absolute, climbs, hides, or has a character that is not for keys.
    """
    parts = key.split("/")
    if len(key.encode()) > KEY_LIMIT or not all(map(_SEGMENT.fullmatch, parts)):
        raise InvalidConfig("this is not a legal artifact key", code="invalid_key")
    return parts


def folder_segments(prefix: str) -> list[str]:
    """The parts of a folder's name, which may end in a slash.

    Raises:
        InvalidConfig: see `segments`.
    """
    return segments(prefix.removesuffix("/"))


def missing(key: str) -> NotFound:
    """The error that says that no such key exists."""
    return NotFound(f"the artifact store has no {key}", code="artifact_not_found")
