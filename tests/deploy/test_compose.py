"""The compose file without a Docker engine: its schema, and what it says about this code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
TEXT = COMPOSE.read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
OURS = ("migrate", "api", "worker")
LASTING = ("postgres", "redis", "store", "api", "worker")
SECRET = re.compile(r"PASSWORD|SECRET|AUTH")


def _check(path: Path) -> subprocess.CompletedProcess[str]:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def seconds(duration: str) -> float:
    """`180s` or `3m` as a number."""
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def modules(command: list[str]) -> list[str]:
    """Python modules that a command runs, by `-m` or as uvicorn's `module:attribute`."""
    run = [command[at + 1] for at, word in enumerate(command) if word == "-m"]
    packages = [name for name in run if (ROOT / name.replace(".", "/")).is_dir()]
    return [
        *(f"{name}.__main__" if name in packages else name for name in run),
        *(word.split(":")[0] for word in command if re.fullmatch(r"[\w.]+:\w+", word)),
    ]


def settings_variables() -> set[str]:
    return {f"TUNERY_{name.upper()}" for name in Settings.model_fields}


def test_the_file_is_what_the_compose_specification_allows() -> None:
    found = _check(COMPOSE)
    assert found.returncode == 0, found.stdout


def test_the_schema_check_would_notice_a_wrong_key(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(TEXT.replace("    stop_grace_period:", "    stop_grace_periods:", 1))
    assert _check(broken).returncode != 0


def test_what_runs_for_long_says_when_it_is_well() -> None:
    for name in LASTING:
        assert "test" in SERVICES[name]["healthcheck"], name


def test_images_are_pinned_to_exact_versions() -> None:
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", service["image"]), name


def test_an_image_has_one_version_throughout() -> None:
    versions: dict[str, set[str]] = {}
    for service in SERVICES.values():
        image, _, version = service["image"].rpartition(":")
        versions.setdefault(image, set()).add(version)
    assert all(len(found) == 1 for found in versions.values()), versions


@pytest.mark.parametrize("name", OURS)
def test_variables_of_ours_are_settings_that_can_be_read(name: str) -> None:
    given = {key: value for key, value in SERVICES[name]["environment"].items()}
    assert {key for key in given if key.startswith("TUNERY_")} <= settings_variables()
    values = {
        key.removeprefix("TUNERY_").lower(): interpolated(value) for key, value in given.items()
    }
    read = Settings.model_validate(values)
    assert read.database_url.get_secret_value().startswith("postgresql+psycopg://tunery:s3cret@")
    assert read.broker_url.get_secret_value() == "redis://:s3cret@redis:6379/0"
    assert read.resolved_store_url() == "s3://tunery"


def interpolated(value: str) -> str:
    """Compose's `${NAME:-default}` and `${NAME:?message}`, with `s3cret` for what must be given."""
    value = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    return re.sub(r"\$\{\w+:\?[^}]*\}", "s3cret", value)


def test_no_secret_has_a_default() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {variable}"
    for reference in re.findall(r"\$\{(\w+)([^}]*)\}", TEXT):
        if SECRET.search(reference[0]):
            assert reference[1].startswith(":?"), reference[0]


def test_commands_name_modules_that_exist() -> None:
    for name in OURS:
        checks = SERVICES[name]["healthcheck"].get("test", [])
        found = modules(SERVICES[name]["command"]) + modules(checks)
        assert found, name
        for module in found:
            assert importlib.util.find_spec(module), f"{name}: {module}"


def test_ports_are_bound_to_this_host_unless_told_otherwise() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:")


def test_the_worker_has_time_to_write_its_checkpoints() -> None:
    worker = SERVICES["worker"]
    grace_s = float(worker["environment"]["TUNERY_STOP_GRACE_S"])
    assert seconds(worker["stop_grace_period"]) >= grace_s + 30


def test_the_worker_has_the_gpus() -> None:
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]


def test_the_broker_keeps_what_it_was_given() -> None:
    command = SERVICES["redis"]["command"][-1]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_no_container_gains_rights_or_writes_outside_its_volumes() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


def test_a_service_starts_after_what_it_needs() -> None:
    for name in ("api", "worker"):
        needs = SERVICES[name]["depends_on"]
        assert needs["migrate"]["condition"] == "service_completed_successfully"
        assert needs["redis"]["condition"] == needs["store"]["condition"] == "service_healthy"
    for service in SERVICES.values():
        for needed in service.get("depends_on", {}):
            assert needed in SERVICES


def test_every_volume_is_declared_and_used() -> None:
    used = {
        mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])
    }
    assert used == set(yaml.safe_load(TEXT)["volumes"])
