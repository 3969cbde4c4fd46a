from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.tunery.cli.conftest import JOB, Service
from tunery.client import wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "pause_before", lambda attempt: 0.0)


def _refusal(status: int, code: str, **ext: Any) -> tuple[int, Any]:
    error = {"message": "no", "type": "x", "param": None, "code": code}
    return status, {"error": error, "ext": ext}


def test_a_pipe_gets_plain_lines_and_json_one_object_a_line(service: Service, tunery: Run) -> None:
    page = {"data": [JOB, {**JOB, "id": "ftjob-0"}], "has_more": False}
    service.answers[f"GET {JOBS}"] = (200, page)
    code, out, err = tunery("jobs", "ls")
    assert code == 0
    assert err == ""
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[:5] for line in lines] == [
        ["ftjob-1", "running", "supervised", "base", "2/4"],
        ["ftjob-0", "running", "supervised", "base", "2/4"],
    ]
    _, out, _ = tunery("jobs", "ls", "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["ftjob-1", "ftjob-0"]


def test_create_uploads_what_is_named_by_path_and_prints_the_id_alone(
    service: Service, tunery: Run, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "job.yaml").write_text("model: base\ntraining_file: rows.jsonl\n")
    file = {"id": "file-9", "filename": "rows.jsonl", "bytes": 14, "purpose": "fine-tune"}
    service.answers["POST /v1/files"] = (200, {**file, "created_at": 1})
    service.answers[f"POST {JOBS}"] = (200, JOB)
    code, out, err = tunery("jobs", "create", "-f", str(tmp_path / "job.yaml"), "--set", "lora.r=4")
    assert (code, out) == (0, "ftjob-1\n")
    assert "uploading" in err
    assert service.asked[-1][1] == {
        "model": "base",
        "training_file": "file-9",
        "method": {"type": "supervised", "supervised": {"adapter": {"type": "lora", "r": 4}}},
    }


def test_a_dry_run_that_finds_problems_exits_3(service: Service, tunery: Run) -> None:
    problem = {"path": "method.supervised.adapter.r", "message": "too large", "code": "x"}
    service.answers[f"POST {JOBS}/dry_run"] = (200, {"valid": False, "problems": [problem]})
    code, out, err = tunery("jobs", "create", "--model", "m", "--dry-run")
    assert (code, out) == (3, "")
    assert "method.supervised.adapter.r: too large" in err


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "invalid_value", 3),
        (401, "invalid_api_key", 5),
        (403, "insufficient_scope", 5),
        (404, "job_not_found", 4),
        (409, "invalid_job_state", 6),
        (503, "service_unavailable", 7),
    ],
)
def test_what_the_service_refuses_sets_the_exit_code(
    service: Service, tunery: Run, status: int, code: str, expected: int
) -> None:
    service.answers[f"POST {JOBS}/ftjob-1/pause"] = _refusal(status, code, hint="do that")
    found, out, err = tunery("jobs", "pause", "ftjob-1")
    assert (found, out) == (expected, "")
    assert err == "error: no\n  do that\n"


def test_no_service_exits_7(service: Service, tunery: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_BASE_URL", "http://127.0.0.1:9")
    code, _, err = tunery("jobs", "get", "ftjob-1")
    assert code == 7
    assert "tunery up" in err


def test_usage_exits_2(service: Service, tunery: Run) -> None:
    assert tunery("jobs", "get")[0] == 2
    assert tunery("jobs", "nonsense")[0] == 2
    assert tunery("jobs", "create", "--training-file", "absent.jsonl")[0] == 2


def test_cancel_asks_and_off_a_terminal_needs_yes(service: Service, tunery: Run) -> None:
    service.answers[f"POST {JOBS}/ftjob-1/cancel"] = (200, {**JOB, "status": "cancelled"})
    code, _, err = tunery("jobs", "cancel", "ftjob-1")
    assert code == 2
    assert "--yes" in err
    assert service.asked == []
    assert tunery("jobs", "cancel", "ftjob-1", "--yes")[0] == 0
    assert [route for route, _ in service.asked] == [f"POST {JOBS}/ftjob-1/cancel"]


def _stream(*events: dict[str, Any]) -> str:
    frames = []
    for i, event in enumerate(events):
        data = json.dumps({"id": f"e{i}", "created_at": 1, "level": "info", **event})
        frames.append(f"id: e{i}\ndata: {data}\n\n")
    return "".join([*frames, "data: [DONE]\n\n"])


POINT = {
    "message": "Step 2/4",
    "type": "metrics",
    "data": {"kind": "metrics", "step": 2, "train_loss": 1.25, "tokens_per_second": 800.0},
}


@pytest.mark.parametrize(
    ("status", "expected"), [("succeeded", 0), ("failed", 10), ("cancelled", 11)]
)
def test_watch_ends_as_the_job_ends(
    service: Service, tunery: Run, status: str, expected: int
) -> None:
    error = {"code": "out_of_memory", "message": "too big"} if status == "failed" else None
    ended = {**JOB, "status": status, "error": error}
    service.answers[f"GET {JOBS}/ftjob-1"] = (200, ended)
    service.answers[f"GET {JOBS}/ftjob-1/events/stream"] = (200, _stream(POINT))
    code, out, err = tunery("jobs", "watch", "ftjob-1")
    assert code == expected
    assert out == "step 2/4  loss 1.2500  800 tok/s\n"
    assert ("out_of_memory: too big" in err) == (status == "failed")


def test_watch_times_out_with_12_and_leaves_the_job(service: Service, tunery: Run) -> None:
    service.answers[f"GET {JOBS}/ftjob-1"] = (200, JOB)
    service.answers[f"GET {JOBS}/ftjob-1/events/stream"] = (200, "")  # cut, again and again
    code, _, err = tunery("jobs", "watch", "ftjob-1", "--timeout", "0.1")
    assert code == 12
    assert "still running" in err
    assert not any("cancel" in route for route, _ in service.asked)


def test_ctrl_c_detaches_from_a_watched_job(
    service: Service, tunery: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunery.client.sync import Jobs

    def interrupted(self: Jobs, job_id: str, **options: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Jobs, "follow", interrupted)
    service.answers[f"GET {JOBS}/ftjob-1"] = (200, JOB)
    code, _, err = tunery("jobs", "watch", "ftjob-1")
    assert code == 0
    assert "detached" in err
    assert {route for route, _ in service.asked} == {f"GET {JOBS}/ftjob-1"}


def test_wait_times_out_with_12(service: Service, tunery: Run) -> None:
    service.answers[f"GET {JOBS}/ftjob-1"] = (200, JOB)
    assert tunery("jobs", "wait", "ftjob-1", "--timeout", "0.05")[0] == 12


def test_metrics_are_csv(service: Service, tunery: Run) -> None:
    service.answers[f"GET {JOBS}/ftjob-1/metrics"] = (200, "step,train_loss\n1,2.5\n")
    assert tunery("jobs", "metrics", "ftjob-1") == (0, "step,train_loss\n1,2.5\n", "")


def test_quiet_leaves_data_and_errors(service: Service, tunery: Run) -> None:
    service.answers[f"POST {JOBS}"] = (200, JOB)
    arguments = ("jobs", "create", "--model", "m", "--training-file", "file-1")
    assert tunery(*arguments)[2] != ""
    assert tunery("--quiet", *arguments) == (0, "ftjob-1\n", "")


def test_a_bug_exits_1_and_says_so(
    service: Service, tunery: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunery.client.sync import Jobs

    def broken(self: Jobs, job_id: str) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Jobs, "get", broken)
    code, _, err = tunery("jobs", "get", "ftjob-1")
    assert code == 1
    assert "bug" in err
    assert "ZeroDivisionError" in err
