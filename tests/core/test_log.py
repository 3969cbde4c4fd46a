from __future__ import annotations

import json
from typing import Any

import pytest
import structlog

from core.log import configure, redact
from core.projects.keys import compose

KEY = compose("key_" + "Ab1" * 8, "Zz9" * 14 + "q")


@pytest.mark.parametrize(
    "secret",
    [
        KEY,
        "hf_" + "a1B2" * 9,
        "whsec_" + "QUJD" * 8,
        "AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_secrets_are_struck_out_wherever_they_stand(secret: str) -> None:
    told = redact(f"before {secret}, after")
    assert secret not in told
    assert told.startswith("before [secret]")
    assert told.endswith("after")


def test_a_password_in_a_url_is_struck_out_and_the_host_stays() -> None:
    told = redact("postgresql://tunery:hunter2@db.example:5432/x failed")
    assert "hunter2" not in told
    assert "@db.example:5432/x failed" in told


def test_ordinary_text_stays_as_it_is() -> None:
    text = "ftjob-abc of ft:base:acme::x at https://host/path?q=a@b, ft_short"
    assert redact(text) == text


def test_a_crash_is_logged_with_its_trace_and_without_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure()

    def fails(password: Any) -> None:
        raise ValueError(f"bad {KEY}")

    try:
        fails(" ".join(("open", "sesame")))
    except ValueError:
        structlog.get_logger().exception("it.crashed", detail=f"key {KEY}")
    entry = json.loads(capsys.readouterr().out)
    assert entry["event"] == "it.crashed"
    assert "ValueError" in entry["exception"]
    assert "open sesame" not in json.dumps(entry)
    assert KEY not in json.dumps(entry)
