"""Write a checkpoint's files where they belong, each checked against the manifest.

A file grows under a `.part` name and gets its own only once its hash is right, so that a folder
never holds a file that is not what the service published. What a broken download left is continued.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tunery.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from tunery.client.objects import ManifestFile


class Landing:
    """One file on its way into `folder`.

    Attributes:
        offset: bytes that are here already; ask for the rest.
        complete: nothing is left to ask for.

    Raises:
        CheckpointCorrupt: the manifest names a path outside the folder.
    """

    def __init__(self, folder: Path, file: ManifestFile) -> None:
        self._file = file
        self.target = target_of(folder, file.path)
        self._draft = self.target.with_name(self.target.name + ".part")
        self._hash = hashlib.sha256()
        self.complete = self.target.is_file() and _sha256(self.target) == file.sha256
        self.offset = 0
        if not self.complete:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._take_over()

    def _take_over(self) -> None:
        """Count and hash what an earlier attempt left, or start afresh if it is too much."""
        if not self._draft.is_file() or self._draft.stat().st_size > self._file.bytes:
            self._draft.write_bytes(b"")
            return
        with self._draft.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                self._hash.update(chunk)
                self.offset += len(chunk)

    @property
    def headers(self) -> dict[str, str]:
        """Asks for what is missing of exactly these bytes; anything else comes whole."""
        if not self.offset:
            return {"accept-encoding": "identity"}
        return {
            "accept-encoding": "identity",
            "range": f"bytes={self.offset}-",
            "if-range": f'"{self._file.sha256}"',
        }

    @property
    def missing(self) -> bool:
        """Whether bytes are still to be asked for."""
        return not self.complete and self.offset < self._file.bytes

    def restart(self) -> None:
        """The service sends the file from its beginning."""
        self._hash, self.offset = hashlib.sha256(), 0
        self._stream.truncate(0)

    def __enter__(self) -> Landing:
        self._stream = self._draft.open("ab")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def write(self, chunk: bytes) -> None:
        self._stream.write(chunk)
        self._hash.update(chunk)
        self.offset += len(chunk)

    def finish(self) -> Path:
        """Give the file its name.

        Raises:
            CheckpointCorrupt: length or hash differ from the manifest; the draft is removed.
        """
        if self.complete:
            return self.target
        found = self._hash.hexdigest()
        if self.offset != self._file.bytes or found != self._file.sha256:
            self._draft.unlink(missing_ok=True)
            raise CheckpointCorrupt(
                f"{self._file.path}: {self.offset} bytes with sha256 {found[:12]}…, expected "
                f"{self._file.bytes} with {self._file.sha256[:12]}…",
                hint="download it again",
            )
        self._draft.replace(self.target)
        self.complete = True
        return self.target


def target_of(folder: Path, path: str) -> Path:
    """Where a manifest's path lies in `folder`.

    Raises:
        CheckpointCorrupt: outside of it. A service is not trusted to choose paths of this machine.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise CheckpointCorrupt(f"the manifest names a path that leaves its folder: {path[:100]!r}")
    return folder.joinpath(*parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
