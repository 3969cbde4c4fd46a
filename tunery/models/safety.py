"""What of a model folder is let in: weights as safetensors, settings as JSON, no code.

A model folder can carry code in three ways: pickled weights, Python files, and configuration keys
that name code or kernels to load (`auto_map` and its kin; CVE-2026-4372 came in by an underscored
key). The first two are refused aloud, because the folder is not what its owner thinks it is; the
third is taken out, because most good models carry a harmless one.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from tunery.errors import InvalidConfig
from tunery.models.shape import read_json, tensor_headers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

ALLOWED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "LICENSE*",
)
"""Patterns of the files that are kept; all lie at the top of the folder."""
_CODE = {".py", ".pyc", ".so", ".pyd", ".dll", ".dylib"}
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
_CODE_KEYS = frozenset({"auto_map", "custom_generate", "custom_pipelines", "trust_remote_code"})


def refuse_unsafe(names: Iterable[str]) -> None:
    """Look at the names of a folder's files.

    Raises:
        InvalidConfig: one is code or a pickle.
    """
    for name in sorted(names):
        suffix = "." + name.rsplit(".", 1)[-1].lower()
        if suffix in _CODE:
            raise InvalidConfig(
                f"the model carries code: {name}",
                code="unsafe_file",
                hint="Tunery runs no code that comes with weights; import a folder without it",
            )
        if suffix in _PICKLES:
            raise InvalidConfig(
                f"the model carries pickled data: {name}",
                code="unsafe_file",
                hint="loading a pickle runs code; convert the weights to safetensors first",
            )


def take(folder: Path, into: Path) -> None:
    """Copy the allowed files of a model folder, configuration keys that load code left out.

    Raises:
        InvalidConfig: unsafe files, no weights, or a broken file.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    refuse_unsafe(path.name for path in files)
    kept = [path for path in files if any(path.match(pattern) for pattern in ALLOWED)]
    if not any(path.suffix == ".safetensors" for path in kept):
        raise InvalidConfig(
            f"there are no safetensors in {folder.name}",
            code="unsafe_file",
            hint="a GGUF file, or a folder with config.json and *.safetensors, can be imported",
        )
    for path in kept:
        shutil.copyfile(path, into / path.name)
    scrub(into)


def scrub(folder: Path) -> None:
    """Take keys that load code out of every JSON file in place, and check every tensor header."""
    for path in folder.glob("*.json"):
        if path.name.endswith("config.json"):
            clean = without_code(read_json(path))
            path.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for path in folder.glob("*.safetensors"):
        tensor_headers(path)


def without_code(value: Any) -> Any:
    """`value` without keys that name code, at any depth.

    Keys that begin with an underscore are transformers' own and never needed to load a model.
    """
    if isinstance(value, dict):
        return {
            key: without_code(inner)
            for key, inner in value.items()
            if key not in _CODE_KEYS and not key.startswith("_")
        }
    if isinstance(value, list):
        return [without_code(inner) for inner in value]
    return value
