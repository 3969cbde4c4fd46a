from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from tunery.client import credentials
from tunery.client.wire import is_loopback
from tunery.errors import Unauthenticated

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNERY_API_KEY", raising=False)
    monkeypatch.delenv("TUNERY_BASE_URL", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("TUNERY_HOME", str(tmp_path / "home"))


def _local_service(home: Path) -> None:
    (home / "run").mkdir(parents=True)
    (home / "run" / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:8301"}))
    (home / "first-key").write_text("ft_local\n")


def test_without_any_key_the_ways_to_get_one_are_named() -> None:
    with pytest.raises(Unauthenticated) as caught:
        credentials.find()
    assert "tunery login" in (caught.value.hint or "")


def test_a_service_on_this_machine_is_found(tmp_path: Path) -> None:
    _local_service(tmp_path / "home")
    found = credentials.find()
    assert (found.base_url, found.api_key) == ("http://127.0.0.1:8301", "ft_local")
    # Its key is not sent to another service.
    with pytest.raises(Unauthenticated):
        credentials.find(base_url="https://elsewhere.test")


def test_login_goes_before_the_local_service_and_the_environment_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _local_service(tmp_path / "home")
    path = credentials.store("https://tunery.test/v1/", "ft_stored")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = credentials.find()
    assert (found.base_url, found.api_key) == ("https://tunery.test", "ft_stored")
    monkeypatch.setenv("TUNERY_BASE_URL", "https://other.test")
    monkeypatch.setenv("TUNERY_API_KEY", "ft_env")
    found = credentials.find()
    assert (found.base_url, found.api_key) == ("https://other.test", "ft_env")


def test_the_proxy_is_left_out_for_this_machine_only() -> None:
    assert is_loopback("http://127.0.0.1:8300")
    assert is_loopback("http://localhost:8300")
    assert is_loopback("http://[::1]:8300")
    assert not is_loopback("http://tunery.test")
