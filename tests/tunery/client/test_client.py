from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from tunery import errors
from tunery.client import AsyncTunery, Tunery, WaitTimeout, wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Handler = Callable[[httpx2.Request], httpx2.Response]

JOB = {"id": "ftjob-1", "status": "running", "model": "m", "created_at": 1, "training_file": "f"}
BASE = "http://service.test"


def _client(handler: Handler) -> Tunery:
    return Tunery("ft_key", BASE + "/v1", transport=httpx2.MockTransport(handler))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "pause_before", lambda attempt: 0.0)


@pytest.mark.parametrize(
    ("status", "code", "cls"),
    [
        (400, "invalid_value", errors.InvalidConfig),
        (401, "invalid_api_key", errors.Unauthenticated),
        (403, "insufficient_scope", errors.PermissionDenied),
        (404, "job_not_found", errors.NotFound),
        (409, "invalid_job_state", errors.Conflict),
        (422, "unsupported_combination", errors.UnsupportedCombination),
        (429, "quota_exceeded", errors.QuotaExceeded),
        (501, "not_supported", errors.NotSupported),
    ],
)
def test_an_error_comes_back_as_it_was_raised(
    status: int, code: str, cls: type[errors.AppError]
) -> None:
    body = {
        "error": {"message": "no", "type": "x", "param": "method.dpo.beta", "code": code},
        "ext": {"hint": "do this", "problems": [{"line": 3}]},
    }
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(status, json=body)

    with _client(answer) as client, pytest.raises(cls) as caught:
        client.jobs.get("ftjob-1")
    found = caught.value
    assert (found.code, found.param, found.hint) == (code, "method.dpo.beta", "do this")
    assert found.problems == [{"line": 3}]
    assert len(asked) == 1  # what the caller must mend is not tried again


def test_a_create_is_repeated_under_one_key_when_the_service_is_away() -> None:
    keys = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        keys.append(request.headers["idempotency-key"])
        if len(keys) == 1:
            raise httpx2.ReadError("cut")
        if len(keys) == 2:
            return httpx2.Response(503, json={"error": {"message": "away", "code": "x"}})
        return httpx2.Response(200, json=JOB)

    with _client(answer) as client:
        job = client.jobs.create(model="m", training_file="f")
    assert job.id == "ftjob-1"
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_no_answer_says_which_service() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    with _client(answer) as client, pytest.raises(errors.ServiceUnavailable) as caught:
        client.jobs.get("ftjob-1")
    assert BASE in str(caught.value)
    assert "tunery up" in (caught.value.hint or "")


def test_an_id_never_opens_another_path() -> None:
    seen = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.url.raw_path)
        return httpx2.Response(200, json=JOB)

    with _client(answer) as client:
        client.jobs.get("../../files?x=")
    assert seen == [b"/v1/fine_tuning/jobs/..%2F..%2Ffiles%3Fx%3D"]


def test_lists_go_on_to_the_last_page() -> None:
    pages = {None: ["a", "b"], "b": ["c"], "c": []}

    def answer(request: httpx2.Request) -> httpx2.Response:
        ids = pages[request.url.params.get("after")]
        rows = [{**JOB, "id": name} for name in ids]
        return httpx2.Response(200, json={"data": rows, "has_more": bool(ids)})

    with _client(answer) as client:
        assert [job.id for job in client.jobs.list()] == ["a", "b", "c"]


def test_waiting_ends_with_the_job_or_with_patience() -> None:
    statuses = ["queued", "running", "succeeded"]

    def answer(request: httpx2.Request) -> httpx2.Response:
        status = statuses.pop(0) if statuses else "running"
        return httpx2.Response(200, json={**JOB, "status": status})

    with _client(answer) as client:
        assert client.jobs.wait("ftjob-1").status == "succeeded"
        with pytest.raises(WaitTimeout, match=r"running after 0\.05 s"):
            client.jobs.wait("ftjob-1", timeout_s=0.05)


def _frame(seq: int) -> str:
    event = {"id": f"ftevent-{seq}", "created_at": seq, "level": "info", "message": f"m{seq}"}
    return f"id: ftevent-{seq}\ndata: {json.dumps(event)}\n\n"


def _broken_stream() -> tuple[Handler, list[str | None]]:
    """Cuts the stream twice, once in the middle of an event."""
    asked: list[str | None] = []
    bodies = [
        _frame(1) + _frame(2) + "id: ftevent-3\ndata: {half",
        ": keep-alive\n\n" + _frame(3),
        _frame(4) + "data: [DONE]\n\n",
    ]

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.headers.get("last-event-id"))
        return httpx2.Response(200, text=bodies[len(asked) - 1])

    return answer, asked


def test_a_cut_event_stream_is_taken_up_where_it_broke() -> None:
    answer, asked = _broken_stream()
    with _client(answer) as client:
        seen = [event.message for event in client.jobs.follow("ftjob-1")]
    assert seen == ["m1", "m2", "m3", "m4"]
    assert asked == [None, "ftevent-2", "ftevent-3"]


async def test_the_async_client_follows_the_same_way() -> None:
    answer, asked = _broken_stream()
    transport = httpx2.MockTransport(answer)
    async with AsyncTunery("ft_key", BASE, transport=transport) as client:
        seen = [event.message async for event in client.jobs.follow("ftjob-1")]
    assert seen == ["m1", "m2", "m3", "m4"]
    assert asked == [None, "ftevent-2", "ftevent-3"]


class Shelf:
    """Serves one checkpoint with one file, with ranges; may cut, or lie."""

    def __init__(self, data: bytes, path: str = "adapter_model.safetensors") -> None:
        self.data, self.path = data, path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.cut_at: int | None = None
        self.asked: list[str | None] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        if path.endswith("/checkpoints/latest"):
            return httpx2.Response(200, json=CHECKPOINT)
        if path.endswith("/files"):
            size = len(self.data)
            row = {"path": self.path, "bytes": size, "sha256": self.sha256, "role": "adapter"}
            return httpx2.Response(200, json={"data": [row]})
        return self._bytes(request)

    def _bytes(self, request: httpx2.Request) -> httpx2.Response:
        asked = request.headers.get("range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if asked:
            assert request.headers["if-range"] == f'"{self.sha256}"'
        end, self.cut_at = self.cut_at, None
        return httpx2.Response(206 if asked else 200, content=self._chunks(start, end))

    def _chunks(self, start: int, end: int | None) -> Any:
        yield self.data[start:end]
        if end is not None:
            raise httpx2.ReadError("cut")


CHECKPOINT = {
    "id": "ftckpt_1",
    "step_number": 8,
    "created_at": 1,
    "fine_tuned_model_checkpoint": "ft:x",
}


def test_a_cut_download_is_continued_and_verified(tmp_path: Path) -> None:
    shelf = Shelf(bytes(range(256)) * 100)
    shelf.cut_at = 1000
    with _client(shelf) as client:
        client.checkpoints.download("ftjob-1", tmp_path)
        assert shelf.asked == [None, "bytes=1000-"]
        client.checkpoints.download("ftjob-1", tmp_path)  # nothing is left to fetch
    assert shelf.asked == [None, "bytes=1000-"]
    assert (tmp_path / shelf.path).read_bytes() == shelf.data
    assert [path.name for path in tmp_path.iterdir()] == [shelf.path]


def test_wrong_bytes_never_get_the_files_name(tmp_path: Path) -> None:
    shelf = Shelf(b"adapter")
    shelf.sha256 = hashlib.sha256(b"another").hexdigest()
    with _client(shelf) as client, pytest.raises(errors.CheckpointCorrupt):
        client.checkpoints.download("ftjob-1", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a//b", "a/../../b", "a\\..\\b", ""])
def test_a_manifest_cannot_write_elsewhere(tmp_path: Path, path: str) -> None:
    with _client(Shelf(b"x", path)) as client, pytest.raises(errors.CheckpointCorrupt):
        client.checkpoints.download("ftjob-1", tmp_path / "here")
    assert list(tmp_path.iterdir()) == []


async def test_the_async_client_downloads_and_continues(tmp_path: Path) -> None:
    data = b"0123456789"
    (tmp_path / "adapter_model.safetensors.part").write_bytes(data[:4])
    shelf = Shelf(data)

    async def answer(request: httpx2.Request) -> httpx2.Response:
        found = shelf(request)
        return httpx2.Response(found.status_code, content=found.read())

    async with AsyncTunery("k", BASE, transport=httpx2.MockTransport(answer)) as client:
        await client.checkpoints.download("ftjob-1", tmp_path)
    assert shelf.asked == ["bytes=4-"]
    assert (tmp_path / shelf.path).read_bytes() == data


def test_a_file_is_uploaded_as_multipart(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text":"hello"}\n')
    row = {"id": "file-1", "filename": "rows.jsonl", "bytes": 17, "purpose": "fine-tune"}

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = request.read()
        assert b'name="purpose"\r\n\r\nfine-tune' in body
        assert b'filename="rows.jsonl"' in body
        assert b'{"text":"hello"}' in body
        return httpx2.Response(200, json={**row, "created_at": 1})

    with _client(answer) as client:
        assert client.files.upload(tmp_path / "rows.jsonl").id == "file-1"


def test_the_card_is_static_and_escapes(tmp_path: Path) -> None:
    from tunery.client.card import job_card
    from tunery.client.objects import Job

    job = Job.model_validate({**JOB, "model": "<script>alert(1)</script>"})
    card = job_card(job, [(1, 2.0), (2, 1.0)])
    assert "<script>" not in card
    assert "<polyline" in card
    assert "http" not in card
    assert "<polyline" not in job._repr_html_()
