from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from core.artifacts import manifest
from core.artifacts.manifest import ManifestEntry
from tunery.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from pathlib import Path

# sha256 of b"abc", from FIPS 180-2.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("resume/rank0.pt", "export/adapter_model.safetensors", "export/README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"abc")
    return tmp_path


def test_build_names_every_file_in_order(folder: Path) -> None:
    assert manifest.build(folder) == [
        ManifestEntry("export/README.md", 3, ABC, "readme"),
        ManifestEntry("export/adapter_model.safetensors", 3, ABC, "weights"),
        ManifestEntry("resume/rank0.pt", 3, ABC, "resume"),
    ]


def test_what_was_built_verifies(folder: Path) -> None:
    entries = manifest.build(folder)
    (folder / "beside").write_bytes(b"not in the manifest")
    manifest.verify(folder, entries)
    assert manifest.from_json(manifest.as_json(entries)) == entries


@pytest.mark.parametrize("content", [b"abd", b"ab", b"abcd", None])
def test_changed_or_missing_bytes_are_refused(folder: Path, content: bytes | None) -> None:
    entries = manifest.build(folder)
    victim = folder / "resume/rank0.pt"
    victim.unlink()
    if content is not None:
        victim.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match=r"resume/rank0\.pt"):
        manifest.verify(folder, entries)


def test_a_path_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "outside").write_bytes(b"abc")
    entry = replace(manifest.build(folder)[0], path="../outside")
    with pytest.raises(CheckpointCorrupt, match="leads out"):
        manifest.verify(folder, [entry])


def test_links_are_refused_both_ways(folder: Path) -> None:
    entries = manifest.build(folder)
    victim = folder / "export/README.md"
    victim.unlink()
    victim.symlink_to(folder / "resume/rank0.pt")
    with pytest.raises(CheckpointCorrupt):
        manifest.verify(folder, entries)
    with pytest.raises(CheckpointCorrupt):
        manifest.build(folder)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("export/adapter_config.json", "config"),
        ("export/tokenizer_config.json", "tokenizer"),
        ("export/chat_template.jinja", "tokenizer"),
        ("export/ft_manifest.json", "provenance"),
        ("export/model.safetensors.index.json", "weights"),
        ("resume/adapter_model.safetensors", "resume"),
        ("export/notes", "other"),
    ],
)
def test_names_tell_roles(path: str, role: str) -> None:
    assert manifest.role_of(path) == role


def test_canonical_json_depends_on_content_alone() -> None:
    assert manifest.canonical({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest.canonical(float("nan"))
