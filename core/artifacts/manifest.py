"""What a checkpoint consists of: every file with its size, its hash and its role."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunery.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

CHUNK_BYTES = 1 << 20

# The first pattern that fits decides; paths are relative to the checkpoint's folder.
ROLES: tuple[tuple[str, str], ...] = (
    ("resume/*", "resume"),
    ("*.safetensors", "weights"),
    ("*.safetensors.index.json", "weights"),
    ("*tokenizer*", "tokenizer"),
    ("*special_tokens_map.json", "tokenizer"),
    ("*added_tokens.json", "tokenizer"),
    ("*vocab.*", "tokenizer"),
    ("*merges.txt", "tokenizer"),
    ("*chat_template*", "tokenizer"),
    ("*ft_manifest.json", "provenance"),
    ("*config.json", "config"),
    ("*README.md", "readme"),
)
OTHER = "other"


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One file.

    Attributes:
        path: relative to the checkpoint's folder, with "/".
        bytes: its size.
        sha256: lower-case hex.
        role: what it is for: weights, config, tokenizer, readme, provenance, resume or other.
    """

    path: str
    bytes: int
    sha256: str
    role: str


def build(folder: Path) -> list[ManifestEntry]:
    """Every file below `folder`, hashed, sorted by path.

    Raises:
        CheckpointCorrupt: there is something else than plain files and folders.
        OSError: a file cannot be read.
    """
    entries = []
    for path in _files(folder):
        relative = path.relative_to(folder).as_posix()
        sha256, size = digest(path)
        entries.append(ManifestEntry(relative, size, sha256, role_of(relative)))
    return sorted(entries, key=lambda entry: entry.path)


def verify(folder: Path, manifest: Iterable[ManifestEntry]) -> None:
    """Hash every file that the manifest names; files beside it are not looked at.

    Raises:
        CheckpointCorrupt: one is missing, is not a plain file, leads out of the folder, or has
            other bytes.
    """
    root = folder.resolve()
    for entry in manifest:
        path = folder / entry.path
        if not path.resolve().is_relative_to(root):
            raise CheckpointCorrupt(f"{entry.path} leads out of its checkpoint")
        if not path.is_file() or path.is_symlink():
            raise CheckpointCorrupt(f"{entry.path} is missing")
        sha256, size = digest(path)
        if size != entry.bytes:
            raise CheckpointCorrupt(f"{entry.path} has {size} bytes instead of {entry.bytes}")
        if sha256 != entry.sha256:
            raise CheckpointCorrupt(f"{entry.path} does not match its hash")


def digest(path: Path) -> tuple[str, int]:
    """SHA-256, in hex, and size of a file."""
    hasher = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
            size += len(chunk)
    return hasher.hexdigest(), size


def role_of(path: str) -> str:
    """What a file of a checkpoint is for, by its name."""
    for pattern, role in ROLES:
        if fnmatch.fnmatchcase(path, pattern):
            return role
    return OTHER


def as_json(manifest: Iterable[ManifestEntry]) -> list[dict[str, Any]]:
    """`[{path, bytes, sha256, role}]`, as it stands in rows and answers."""
    return [asdict(entry) for entry in manifest]


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[ManifestEntry]:
    """The inverse of `as_json`."""
    return [ManifestEntry(row["path"], row["bytes"], row["sha256"], row["role"]) for row in rows]


def canonical(document: Any) -> bytes:
    """JSON whose bytes depend on nothing but its content: sorted keys, no blanks, ASCII.

    Raises:
        ValueError: it holds NaN or an infinity.
    """
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _files(folder: Path) -> list[Path]:
    found = []
    for name in os.listdir(folder):
        path = folder / name
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            found += _files(path)
        elif stat.S_ISREG(mode):
            found.append(path)
        else:
            raise CheckpointCorrupt(f"{name} is neither a file nor a folder")
    return found
