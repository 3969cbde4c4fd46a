from __future__ import annotations

import json
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.tunery.models.folders import write_llama
from tunery import __version__
from tunery.cli.output import count, duration, size
from tunery.cli.watching import Watch, sparkline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tunery.cli.conftest import Service

    Run = Callable[..., tuple[int, str, str]]


def test_models_are_imported_listed_and_removed(
    service: Service, tunery: Run, tmp_path: Path
) -> None:
    folder = write_llama(tmp_path / "tiny")
    code, out, err = tunery("models", "import", str(folder), "--name", "me/tiny")
    assert (code, out) == (0, "me/tiny\n")
    assert "6 parameters" in err
    code, out, _ = tunery("models", "ls", "--json")
    assert json.loads(out)["id"] == "me/tiny"
    assert tunery("models", "remove", "me/tiny")[0] == 2  # nobody to ask
    assert tunery("models", "remove", "me/tiny", "--yes")[0] == 0
    assert tunery("models", "ls")[1] == ""
    code, _, err = tunery("models", "remove", "me/tiny", "--yes")
    assert code == 4


def test_an_unsafe_model_is_refused_with_3(service: Service, tunery: Run, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    code, out, err = tunery("models", "import", str(folder))
    assert (code, out) == (3, "")
    assert "safetensors" in err


def test_methods_come_from_the_catalogue(service: Service, tunery: Run) -> None:
    code, out, _ = tunery("methods", "ls")
    assert code == 0
    assert "adapters\tlora\t" in out
    code, out, _ = tunery("methods", "show", "adapters/lora", "--json")
    assert json.loads(out)["name"] == "lora"
    assert "\nr\t" in tunery("methods", "show", "lora")[1]
    assert tunery("methods", "show", "loro")[0] == 4


def test_login_keeps_a_key_that_works_and_no_other(
    service: Service, tunery: Run, tmp_path: Path
) -> None:
    kept = tmp_path / "config" / "tunery" / "credentials.json"
    refusal = {"error": {"message": "no", "type": "x", "param": None, "code": "invalid_api_key"}}
    service.answers["GET /v1/fine_tuning/jobs"] = (401, refusal)
    assert tunery("login", service.url, "--key", "ft_bad")[0] == 5
    assert not kept.exists()
    service.answers["GET /v1/fine_tuning/jobs"] = (200, {"data": [], "has_more": False})
    assert tunery("login", service.url, "--key", "ft_good")[0] == 0
    assert json.loads(kept.read_text()) == {"url": service.url, "api_key": "ft_good"}
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_the_version_and_help_need_nothing(tunery: Run) -> None:
    assert tunery("--version") == (0, __version__ + "\n", "")
    code, out, _ = tunery("--help")
    assert code == 0
    for command in ("up", "train", "jobs", "models", "doctor"):
        assert command in out


def test_the_command_line_loads_without_torch() -> None:
    code = "import sys, tunery.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 98_362_432, 5e12)] == [
        "0 B",
        "999 B",
        "98.4 MB",
        "5000.0 GB",
    ]
    assert [count(n) for n in (7, 18_400, 134_515_008)] == ["7", "18.4k", "134.5M"]
    assert [duration(s) for s in (42, 1080, 7500)] == ["42 s", "18 min", "2 h 05 min"]


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 3.5, 7.0]) == "▁▅█"


def test_a_watch_renders_what_it_knows() -> None:
    from rich.console import Console

    watch = Watch("ftjob-1")
    watch.total_steps, watch.seconds_remaining = 3000, 1080.0
    watch.measure(1240, {"train_loss": 1.082, "tokens_per_second": 18_400.0})
    watch.measure(1000, {"valid_loss": 1.117})
    console = Console(width=100, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(watch.render("Ctrl-C detaches"))
    console.file.close()
    text = console.export_text()
    for part in ("step 1,240/3,000", "41%", "ETA 18 min", "loss 1.082", "1.117 @1,000", "18.4k"):
        assert part in text
