"""Base models from a Hugging Face-shaped hub, pinned to a commit."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.errors import BaseModelUnavailable
from tunery.models.safety import ALLOWED, take

if TYPE_CHECKING:
    from tunery.models.store import ModelInfo, ModelStore

LOOKUP_TIMEOUT_S = 5.0
"""How long the hub may take to say which commit a name means; the download itself has no limit."""


def download(store: ModelStore, name: str, revision: str | None = None) -> ModelInfo:
    """Fetch a model into the store.

    Args:
        revision: a commit, branch or tag; None means the default branch. What is recorded is
            always the commit.

    Raises:
        BaseModelUnavailable: the hub is out of reach, or has no such model for us.
        InvalidConfig: the model is unsafe or of a family that is not known.
    """
    place = store.place(name)
    commit = commit_of(name, revision)
    source = {"kind": "hub", "location": f"{name}@{commit}", "sha256": None}

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".hub-") as cache:
            _snapshot(name, commit, Path(cache))
            take(Path(cache), folder)

    return store.add(name, fill, source, revision=commit, imported_at=time.time())


def commit_of(name: str, revision: str | None) -> str:
    """The commit that a name means at the hub now.

    Raises:
        BaseModelUnavailable: the hub does not answer in time, or does not know the name.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise _unavailable(name, "HF_HUB_OFFLINE is set")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise _unavailable(name, "huggingface_hub is not installed") from error
    try:
        info = HfApi().model_info(name, revision=revision, timeout=LOOKUP_TIMEOUT_S)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unavailable(name, _reason(error)) from error
    except Exception as error:
        # huggingface_hub lets its HTTP library's errors through, and which library that is
        # differs between its major versions.
        if not type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests")):
            raise
        raise _unavailable(name, _reason(error)) from error
    if not info.sha:
        raise _unavailable(name, "the hub names no commit for it")
    return str(info.sha)


def _snapshot(name: str, commit: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        # What is not on the list, code and pickles above all, is not even fetched.
        snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=list(ALLOWED))
    except (OSError, RuntimeError) as error:
        raise _unavailable(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def _unavailable(name: str, why: str) -> BaseModelUnavailable:
    return BaseModelUnavailable(
        f"base model {name!r} cannot be fetched from the hub ({why})",
        hint="`tunery models import` takes a GGUF file, a wheel or a folder instead",
        param="model",
    )
