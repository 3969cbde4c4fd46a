from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tunery.cli.request_file import override, read
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from pathlib import Path


def test_settings_go_where_they_belong() -> None:
    body = override(
        {"model": "m", "method": {"type": "dpo"}},
        [
            "lora.r=32",
            "adapter.lora_alpha=64",
            "learning_rate=1e-4",
            "ext.compute.gpus=2",
            "seed=7",
        ],
    )
    assert body == {
        "model": "m",
        "seed": 7,
        "ext": {"compute": {"gpus": 2}},
        "method": {
            "type": "dpo",
            "dpo": {
                "adapter": {"type": "lora", "r": 32, "lora_alpha": 64},
                "hyperparameters": {"learning_rate": 1e-4},
            },
        },
    }


def test_without_a_method_settings_go_to_supervised() -> None:
    body = override({}, ["n_epochs=2", "ia3.target_modules=[k_proj]"])
    settings = body["method"]["supervised"]
    assert body["method"]["type"] == "supervised"
    assert settings["hyperparameters"] == {"n_epochs": 2}
    assert settings["adapter"] == {"type": "ia3", "target_modules": ["k_proj"]}


@pytest.mark.parametrize("setting", ["seed", "=3", "model.name=x", "seed=[1"])
def test_a_setting_that_fits_nowhere_is_refused(setting: str) -> None:
    with pytest.raises(InvalidConfig, match="--set"):
        override({"model": "m"}, [setting])


def test_a_file_must_hold_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    for name in ("list.yaml", "broken.yaml", "absent.yaml"):
        with pytest.raises(InvalidConfig):
            read(tmp_path / name)
