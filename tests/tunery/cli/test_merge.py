"""`tunery models merge`, on a tiny model of this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.tunery.training.test_merging import CONFIGS, adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tunery.cli.conftest import Service

    Run = Callable[..., tuple[int, str, str]]

pytest_plugins = ("tests.tunery.training.conftest",)


def test_an_adapter_and_its_base_become_one_model(
    service: Service, tunery: Run, base_model: Path, tmp_path: Path
) -> None:
    export, into = adapter(base_model, tmp_path / "export", CONFIGS["lora"]), tmp_path / "merged"
    code, out, err = tunery("models", "merge", str(export), "--into", str(into), "--json")
    assert code == 0, err
    assert json.loads(out)["dtype"] == "float32"
    assert "lost to rounding" in err
    assert (into / "model.safetensors").exists()
    code, _, err = tunery("models", "merge", str(export), "--into", str(into))
    assert code == 6
    assert "exists" in err


def test_what_is_no_adapter_is_named(service: Service, tunery: Run, tmp_path: Path) -> None:
    code, _, err = tunery("models", "merge", str(tmp_path), "--into", str(tmp_path / "new"))
    assert code == 4
    assert "--base" in err
