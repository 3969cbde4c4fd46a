"""Base models on this machine: a folder each, and a note saying where it came from.

    <models_dir>/<name, "/" written as "-->/
      config.json  *.safetensors  tokenizer.json ...   what transformers loads
      tunery_model.json                                source, hashes, when

A folder under its final name is complete: it is filled under a hidden name and renamed.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunery.errors import BaseModelUnavailable, InvalidConfig
from tunery.models.shape import read_json, shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tunery.entries import ModelShape

NOTE = "tunery_model.json"
# What hubs accept; "--" is kept for the separator, so that folder and name convert both ways.
_NAME = re.compile(r"(?!.*--)[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True)
class ModelInfo:
    """One base model of the store."""

    name: str
    revision: str | None
    """Commit of a hub model; None for an imported one."""
    path: Path
    shape: ModelShape
    chat_template_sha256: str | None
    parameters: int
    source: dict[str, Any]
    """`{kind: gguf | wheel | folder | hub | package, location, sha256}`."""
    size_bytes: int
    imported_at: float
    """Unix seconds."""

    def as_json(self) -> dict[str, Any]:
        """What is shown of it: all but the place on this machine."""
        return {
            "id": self.name,
            "revision": self.revision,
            "architecture": self.shape.architecture,
            "parameters": self.parameters,
            "context_length": self.shape.max_position_embeddings,
            "chat_template": self.chat_template_sha256 is not None,
            "size_bytes": self.size_bytes,
            "source": self.source,
            "imported_at": int(self.imported_at),
        }


class ModelStore:
    """The base models in one folder.

    Args:
        hub_allowed: whether `locate` may download what is missing.
    """

    def __init__(self, folder: Path, hub_allowed: bool = False) -> None:
        self.folder = folder
        self.hub_allowed = hub_allowed

    def list(self) -> Sequence[ModelInfo]:
        """All complete models, by name."""
        notes = sorted(self.folder.glob(f"*/{NOTE}"))
        return [_read(note.parent) for note in notes if not note.parent.name.startswith(".")]

    def get(self, name: str) -> ModelInfo | None:
        """The model of that name, or None."""
        if not is_name(name) or not (self.place(name) / NOTE).is_file():
            return None
        return _read(self.place(name))

    def nearest(self, name: str) -> Sequence[str]:
        """Known names that look like `name`, best first."""
        known = {info.name.lower(): info.name for info in self.list()}
        return [known[key] for key in difflib.get_close_matches(name.lower(), known, n=3)]

    def place(self, name: str) -> Path:
        """Where the model of that name lies, or would lie.

        Raises:
            InvalidConfig: not a model name.
        """
        if not is_name(name):
            raise InvalidConfig(
                f"{name[:100]!r} is not a model name",
                hint="letters, digits, '.', '_' and '-', with at most one '/'",
                param="model",
            )
        return self.folder / name.replace("/", "--")

    def locate(self, name: str, revision: str | None = None) -> Path:
        """The folder of a base model, fetched from the hub if need be and allowed.

        Blocks while it downloads: call it from a thread.

        Raises:
            BaseModelUnavailable: it is not here and cannot be had, or is here at another revision.
        """
        info = self.get(name)
        if info is None:
            info = self._fetch(name, revision)
        if revision is not None and info.revision is not None and info.revision != revision:
            raise BaseModelUnavailable(
                f"base model {name!r} is here at revision {info.revision}, not {revision}",
                param="model",
            )
        return info.path

    def _fetch(self, name: str, revision: str | None) -> ModelInfo:
        why = f"base model {name!r} is not on this machine"
        if self.hub_allowed:
            from tunery.models.hub import download

            try:
                return download(self, name, revision)
            except BaseModelUnavailable as error:
                why = error.message
        near = self.nearest(name)
        raise BaseModelUnavailable(
            why,
            hint=(f"did you mean {near[0]!r}? " if near else "")
            + f"`tunery models import <file or folder> --name {name}` brings one in",
            param="model",
        )

    def shape(self, path: Path) -> ModelShape:
        """The shape of the model in a folder, in the store or not."""
        return shape(path)

    def add(
        self,
        name: str,
        fill: Callable[[Path], None],
        source: dict[str, Any],
        *,
        revision: str | None = None,
        imported_at: float,
    ) -> ModelInfo:
        """Put a model in: `fill` writes its files into the empty folder it is given.

        One process at a time adds a given name; who comes second finds it there.

        Raises:
            InvalidConfig: what was written is not a model that we can train.
        """
        final = self.place(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f".{final.name}.lock"):
            if (present := self.get(name)) is not None:
                return present
            incoming = tempfile.TemporaryDirectory(dir=self.folder, prefix=".incoming-")
            with incoming as draft_name:
                draft = self.folder / draft_name / "model"
                draft.mkdir()
                fill(draft)
                shape(draft)
                _write_note(draft, name, revision, source, imported_at)
                draft.rename(final)
        return _read(final)

    def remove(self, name: str) -> bool:
        """Delete a model; False when there is none of that name."""
        if self.get(name) is None:
            return False
        shutil.rmtree(self.place(name))
        return True


def is_name(name: str) -> bool:
    """Whether a string can be a model's name."""
    return _NAME.fullmatch(name) is not None


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def chat_template(folder: Path) -> str | None:
    """The Jinja source of the folder's default chat template."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _write_note(
    folder: Path, name: str, revision: str | None, source: dict[str, Any], imported_at: float
) -> None:
    template = chat_template(folder)
    files = [
        {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    ]
    note = {
        "version": 1,
        "name": name,
        "revision": revision,
        "source": source,
        "imported_at": imported_at,
        "chat_template_sha256": (
            hashlib.sha256(template.encode()).hexdigest() if template is not None else None
        ),
        "files": files,
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _read(folder: Path) -> ModelInfo:
    note = read_json(folder / NOTE)
    found = shape(folder)
    return ModelInfo(
        name=note["name"],
        revision=note["revision"],
        path=folder,
        shape=found,
        chat_template_sha256=note["chat_template_sha256"],
        parameters=found.parameters,
        source=note["source"],
        size_bytes=sum(file["bytes"] for file in note["files"]),
        imported_at=note["imported_at"],
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
