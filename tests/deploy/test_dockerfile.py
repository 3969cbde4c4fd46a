"""The image's recipe without a Docker engine: a linter, and what it says about this code."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from core.settings import Settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile.gpu").read_text(encoding="utf-8")


def logical_lines(text: str) -> list[str]:
    """Instructions, with continued lines joined and comments dropped."""
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [line for line in kept.replace("\\\n", " ").splitlines() if line.strip()]


def stages() -> dict[str, list[str]]:
    """Instructions by stage, those of the stages it is made from first."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in logical_lines(TEXT):
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = start[2]
            found[name] = list(found.get(start[1], [line]))
        else:
            found[name].append(line)
    return found


def last(stage: str, instruction: str) -> str:
    """The argument of a stage's last such instruction."""
    return [line for line in stages()[stage] if line.startswith(instruction)][-1].split(" ", 1)[1]


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(_scripts()))
    if hadolint is None:
        pytest.skip("hadolint has no wheel for this platform")
    found = subprocess.run(
        [hadolint, str(ROOT / "Dockerfile.gpu")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stdout


def _scripts() -> Path:
    import sysconfig

    return Path(sysconfig.get_path("scripts"))


@pytest.mark.parametrize("stage", ["service", "worker"])
def test_an_image_runs_as_nobody_in_particular(stage: str) -> None:
    assert last(stage, "USER") == "10001:10001"


@pytest.mark.parametrize("stage", ["service", "worker"])
def test_an_image_runs_what_the_compose_file_runs(stage: str) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    command = services["api" if stage == "service" else "worker"]["command"]
    flat = " ".join(command).replace("=", " ")
    assert " ".join(json.loads(last(stage, "CMD"))) == flat


@pytest.mark.parametrize("stage", ["service", "worker"])
def test_an_image_says_when_it_is_well(stage: str) -> None:
    check = json.loads(last(stage, "HEALTHCHECK").split(" CMD ")[1])
    assert check[0] == "python"
    if check[1] == "-m":
        assert importlib.util.find_spec(check[2])
    else:
        compile(check[2], "healthcheck", "exec")


def test_bases_are_pinned_to_exact_versions() -> None:
    bases = re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)
    outside = [base for base in bases if base not in stages()]
    assert outside
    assert all(re.fullmatch(r"\S+:\d+\.\d+\.\d+-\S+", base) for base in outside)


def test_what_is_installed_is_what_the_tests_ran_with() -> None:
    installs = [line for line in logical_lines(TEXT) if "pip install" in line]
    assert installs
    for line in installs:
        assert "--constraint constraints.txt" in line or "--no-deps" in line, line
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    # A local version such as +cpu would shut out the wheels that bring CUDA along.
    assert re.search(r"^torch==[\d.]+$", pins, re.MULTILINE)


def test_extras_that_are_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {name for group in re.findall(r'"\.\[([\w,]+)\]"', TEXT) for name in group.split(",")}
    assert named == {"server", "train"}
    assert named <= set(project["optional-dependencies"])


def test_the_service_image_never_meets_torch() -> None:
    built = " ".join(stages()["build-service"])
    assert re.findall(r'"\.\[([\w,]+)\]"', built) == ["server"]


def test_the_build_is_given_every_package_that_is_installed() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    for name in packages:
        assert f"!{name.rstrip('*')}" in ignored
    assert f"!{project['project']['readme']}" in ignored


def test_variables_of_ours_are_settings() -> None:
    named = set(re.findall(r"\bTUNERY_\w+(?==)", TEXT))
    assert named <= {f"TUNERY_{name.upper()}" for name in Settings.model_fields}
