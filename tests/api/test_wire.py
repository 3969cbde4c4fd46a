"""The envelope on every way to fail, retries that make one job, streams that lose nothing."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest
from openai.types.fine_tuning import FineTuningJobEvent

from core.db import claims
from tests.api.test_jobs import JOBS

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.api.conftest import Service, Worker


@pytest.fixture
def body(data_file: str, base_model: str) -> dict[str, Any]:
    return {"model": base_model, "training_file": data_file}


# Errors


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", JOBS, b"{not json", 400, "invalid_json"),
        ("POST", JOBS, b"[1]", 400, "invalid_value"),
        ("POST", JOBS, b'{"seed": NaN}', 400, "invalid_json"),
        ("POST", JOBS, b"[" * 100_000, 400, "invalid_json"),
        ("POST", JOBS, b"\xff", 400, "invalid_json"),
        ("POST", JOBS, b" " * (1 << 21), 413, "request_too_large"),
        ("GET", "/v1/nowhere", None, 404, "unknown_url"),
        ("GET", "/", None, 404, "unknown_url"),
        ("PUT", JOBS, None, 405, "method_not_allowed"),
        ("GET", f"{JOBS}/ftjob-x", None, 404, "job_not_found"),
        ("GET", f"{JOBS}/ftjob-x/metrics?step_from=abc", None, 400, "invalid_value"),
        ("GET", "/v1/models/no/such", None, 404, "model_not_found"),
        ("POST", "/v1/fine_tuning/alpha/graders/run", b"{}", 501, "not_supported"),
        ("GET", "/v1/fine_tuning/checkpoints/ft:a/b:c::d/permissions", None, 501, "not_supported"),
        ("POST", "/v1/webhook_endpoints", b"{}", 501, "not_supported"),
    ],
)
async def test_every_failure_wears_the_envelope(
    http: httpx2.AsyncClient,
    method: str,
    path: str,
    content: bytes | None,
    status: int,
    code: str,
) -> None:
    answer = await http.request(method, path, content=content)
    assert answer.status_code == status
    envelope = answer.json()
    assert set(envelope["error"]) == {"message", "type", "param", "code"}
    assert envelope["error"]["code"] == code
    assert envelope["error"]["message"]
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["ft-version"]
    assert ("x-should-retry" in answer.headers) is (status == 501)


async def test_a_body_of_undeclared_length_is_bounded_too(http: httpx2.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(64):
            yield b" " * 65536

    answer = await http.post(JOBS, content=endless())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_crash_shows_an_id_and_no_trace(
    service: Service,
    http: httpx2.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError(f"a canary {key} in the message")

    monkeypatch.setattr("core.db.views.usage", broken)
    answer = await http.get("/v1/quota")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "canary" not in answer.text
    log = capsys.readouterr().out
    assert answer.headers["x-request-id"] in log
    assert "canary" in log
    assert key not in log


async def test_postgres_away_is_503_and_may_be_retried(
    service: Service, http: httpx2.AsyncClient
) -> None:
    await http.get(JOBS)  # the key is known from here on
    from sqlalchemy.exc import OperationalError

    class Away:
        def __call__(self) -> Any:
            raise OperationalError("select", {}, Exception("connection refused"))

    service.app.state.service.db._sessions = Away()
    answer = await http.get(JOBS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert "x-should-retry" not in answer.headers
    assert (await http.get("/healthz")).status_code == 200
    ready = await http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"]["postgres"] == "ServiceUnavailable"
    assert ready.json()["checks"]["store"] == "ok"


async def test_an_invalid_request_over_quota_is_told_that_it_is_invalid(
    service: Service, body: dict[str, Any]
) -> None:
    await service.limit("acme", 1)
    http = service.http(await service.key())
    assert (await http.post(JOBS, json=body)).status_code == 200
    over = await http.post(JOBS, json=body)
    assert (over.status_code, over.json()["error"]["code"]) == (429, "quota_exceeded")
    assert over.json()["error"]["type"] == "quota_error"
    assert over.headers["x-should-retry"] == "false"
    assert (await http.post(JOBS, json=body | {"seed": "x"})).status_code == 400
    assert (await http.post(JOBS, json=body | {"training_file": "file-x"})).status_code == 400
    assert (await http.post(JOBS, json=body | {"ext": {"queue": "none"}})).status_code == 422


async def test_a_hundred_submissions_at_a_quota_of_five_make_five_jobs(
    service: Service, body: dict[str, Any]
) -> None:
    await service.limit("acme", 5)
    http = service.http(await service.key())
    answers = await asyncio.gather(*(http.post(JOBS, json=body) for _ in range(100)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 95


# Keys


async def test_unknown_and_wrong_keys_are_answered_alike(service: Service, key: str) -> None:
    from core.projects.keys import compose, split

    found = split(key)
    assert found is not None
    public_id, secret = found
    wrong = compose(public_id, secret[::-1])
    unknown = compose("key_" + "0" * 24, secret)
    typo = key[:-1] + ("0" if key[-1] != "0" else "1")
    answers = [await service.http(bad).get(JOBS) for bad in (wrong, unknown, typo, "sk-other")]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1


async def test_a_mistyped_key_costs_no_query(service: Service, key: str) -> None:
    from sqlalchemy import event

    asked: list[str] = []
    engine = service.app.state.service.db._engine.sync_engine
    event.listen(
        engine, "before_cursor_execute", lambda c, cur, statement, *rest: asked.append(statement)
    )
    typo = key[:10] + ("a" if key[10] != "a" else "b") + key[11:]
    assert (await service.http(typo).get(JOBS)).status_code == 401
    assert not any("api_keys" in statement for statement in asked)
    assert (await service.http(key).get(JOBS)).status_code == 200
    assert any("api_keys" in statement for statement in asked)


async def test_revocation_and_expiry_end_a_key(service: Service) -> None:
    from datetime import timedelta

    from core.db import projects
    from core.projects.keys import KeyRing, create_key
    from tunery.errors import Unauthenticated

    key = await service.key()
    ring = KeyRing(service.db, cache_s=0.2)
    principal = await ring.authenticate(key)
    async with service.db.begin() as session:
        assert await projects.revoke_key(session, principal.key)
    await asyncio.sleep(0.25)
    with pytest.raises(Unauthenticated):
        await ring.authenticate(key)
    _, short = await create_key(
        service.db, await service.project(), name="short", lifetime=timedelta(seconds=0.3)
    )
    eternal = KeyRing(service.db, cache_s=1000)
    await eternal.authenticate(short)
    await asyncio.sleep(0.35)
    with pytest.raises(Unauthenticated):
        await eternal.authenticate(short)
    await ring.flush()
    async with service.db.session() as session:
        rows = await projects.list_keys(session, None)
    used = {row.public_id: row.last_used_at for row in rows}
    assert used[principal.key] is not None


async def test_another_projects_header_is_refused(service: Service, key: str) -> None:
    mine = (await service.project()).public_id
    assert (await service.http(key, **{"openai-project": mine}).get(JOBS)).status_code == 200
    answer = await service.http(key, **{"openai-project": "proj_other"}).get(JOBS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "project_mismatch")


# Retries


class DropOnce(httpx2.AsyncBaseTransport):
    """Delivers the first POST, then breaks the connection before its answer is read."""

    def __init__(self) -> None:
        self.inner = httpx2.AsyncHTTPTransport()
        self.dropped: list[httpx2.Response] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self.inner.handle_async_request(request)
        if request.method == "POST" and not self.dropped:
            await response.aread()
            self.dropped.append(response)
            raise httpx2.ReadError("the connection broke", request=request)
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k1"}])
async def test_a_lost_answer_and_the_clients_own_retry_make_one_job(
    service: Service, key: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    transport = DropOnce()
    client = service.openai(key, http_client=openai.DefaultAsyncHttpxClient(transport=transport))
    job = await client.fine_tuning.jobs.create(**body, extra_headers=headers)
    assert json.loads(transport.dropped[0].content)["id"] == job.id
    assert [found.id async for found in client.fine_tuning.jobs.list()] == [job.id]
    # A deliberate second job stays possible.
    second = await client.fine_tuning.jobs.create(**body)
    assert second.id != job.id


async def test_an_idempotency_key_replays_refuses_and_belongs_to_a_project(
    service: Service, http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    named = {"idempotency-key": "abc"}
    first = await http.post(JOBS, json=body, headers=named)
    again = await http.post(JOBS, json=dict(reversed(body.items())), headers=named)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    other = await http.post(JOBS, json=body | {"seed": 5}, headers=named)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    rival = service.http(await service.key("rival"), **named)
    file = await service.add_file("rival")
    theirs = await rival.post(JOBS, json=body | {"training_file": file})
    assert theirs.status_code == 200
    assert theirs.json()["id"] != first.json()["id"]
    assert (
        await http.post(JOBS, json=body, headers={"idempotency-key": "x" * 256})
    ).status_code == 400


async def test_the_same_key_at_once_makes_one_job(
    http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    async def post() -> httpx2.Response:
        return await http.post(JOBS, json=body, headers={"idempotency-key": "race"})

    answers = await asyncio.gather(*(post() for _ in range(12)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    ids = {answer.json()["id"] for answer in answers if answer.status_code == 200}
    assert len(ids) == 1
    for answer in answers:
        if answer.status_code == 409:
            assert answer.json()["error"]["code"] == "idempotency_in_progress"
            assert answer.headers["retry-after"] == "1"
            assert "x-should-retry" not in answer.headers
    assert len((await http.get(JOBS)).json()["data"]) == 1


async def test_a_refused_create_does_not_use_its_key_up(
    http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    named = {"idempotency-key": "k"}
    assert (await http.post(JOBS, json=body | {"model": "no/pe"}, headers=named)).status_code == 400
    assert (await http.post(JOBS, json=body, headers=named)).status_code == 200


# Streams


async def test_a_broken_stream_goes_on_without_gap_or_repeat(
    client: AsyncOpenAI, http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    job = await client.fine_tuning.jobs.create(**body)
    claim = await worker.claim()
    path = f"{JOBS}/{job.id}/events/stream"
    seen: list[str] = []

    async def read(until: int, **headers: str) -> bool:
        """Read until so many are seen, then break off; whether the stream ended by itself."""
        async with http.stream("GET", path, headers=headers) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return True
                if line.startswith("id: "):
                    seen.append(line[4:])
                if len(seen) >= until:
                    return False
        return False

    async def train() -> None:
        for step in range(1, 21):
            await worker.step(claim, step, train_loss=1 / step)
            await asyncio.sleep(0.02)
        async with worker.db.begin() as session:
            await claims.fail(session, claim, error={"code": "x", "message": "m"}, retryable=False)

    training = asyncio.create_task(train())
    assert not await read(4)
    assert not await read(11, **{"last-event-id": seen[-1]})
    assert await read(10_000, **{"last-event-id": seen[-1]})
    await training
    history = [event.id async for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert seen == history[::-1]
    assert len(seen) == len(set(seen))


async def test_the_stock_client_reads_our_stream(client: AsyncOpenAI, body: dict[str, Any]) -> None:
    job = await client.fine_tuning.jobs.create(**body)
    await client.fine_tuning.jobs.cancel(job.id)
    stream = await client.get(
        f"/fine_tuning/jobs/{job.id}/events/stream",
        cast_to=FineTuningJobEvent,
        stream=True,
        stream_cls=openai.AsyncStream[FineTuningJobEvent],
    )
    kinds = [event.data["kind"] async for event in stream]  # type: ignore[index]
    assert kinds == ["status", "status"]


async def test_an_idle_stream_is_kept_alive_and_ends_with_the_service(
    service: Service,
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.routes.observation.KEEP_ALIVE_S", 0.2)
    job = (await http.post(JOBS, json=body)).json()["id"]
    comments = 0
    async with http.stream("GET", f"{JOBS}/{job}/events/stream") as response:
        async for line in response.aiter_lines():
            comments += line == ": keep-alive"
            if comments == 2:
                service.app.state.service.stopping.set()
    assert comments >= 2


async def test_metrics_are_columns_and_csv_with_openais_names_first(
    client: AsyncOpenAI, http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    job = await client.fine_tuning.jobs.create(**body)
    claim = await worker.claim()
    for step in (1, 2, 3):
        await worker.step(
            claim,
            step,
            train_loss=3.0 - step / 2,
            train_mean_token_accuracy=step / 4,
            grad_norm=1.0,
        )
    await worker.step(claim, 3, valid_loss=1.25)
    data = (await http.get(f"{JOBS}/{job.id}/metrics", params={"keys": "train_loss"})).json()[
        "data"
    ]
    assert data["train_loss"]["steps"] == [1, 2, 3]
    assert data["train_loss"]["values"] == [2.5, 2.0, 1.5]
    assert set(data) == {"train_loss"}
    text = (await http.get(f"{JOBS}/{job.id}/metrics", headers={"accept": "text/csv"})).text
    assert text.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,grad_norm",
        "1,2.5,0.25,,,1.0",
        "2,2.0,0.5,,,1.0",
        "3,1.5,0.75,1.25,,1.0",
    ]


async def test_logs_are_text_with_a_cursor_and_need_their_scope(
    service: Service, http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    from core.db import logs

    job = (await http.post(JOBS, json=body)).json()["id"]
    claim = await worker.claim()
    for part in ("one\ntwo\n", "three\n"):
        async with worker.db.begin() as session:
            await logs.append(session, claim.job_id, claim.attempt, part)
    path = f"{JOBS}/{job}/logs"
    whole = await http.get(path)
    assert whole.text == "one\ntwo\nthree\n"
    assert (await http.get(path, params={"tail": 2})).text == "two\nthree\n"
    async with worker.db.begin() as session:
        await logs.append(session, claim.job_id, claim.attempt, "four\n")
    rest = await http.get(path, params={"after": whole.headers["x-log-cursor"]})
    assert rest.text == "four\n"
    blind = service.http(await service.key(scopes=["jobs:read"]))
    assert (await blind.get(path)).status_code == 403


@pytest.mark.parametrize(
    "junk",
    [
        '{"metadata": {"a": "x\\u0000y"}}',
        '{"suffix": "\\ud800"}',
        '{"metadata": {"a\\u0000": "b"}}',
        '{"whatever": 1e999}',
        '{"whatever": NaN}',
        '{"whatever": ' + "[" * 900 + "]" * 900 + "}",
    ],
)
async def test_what_the_database_cannot_keep_is_a_bad_request(
    http: httpx2.AsyncClient, junk: str
) -> None:
    for path in ("", "/dry_run"):
        answer = await http.post(f"/v1/fine_tuning/jobs{path}", content=junk.encode())
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_an_escaped_backslash_before_u0000_is_text(http: httpx2.AsyncClient) -> None:
    body = {"model": "no/such", "training_file": "file-none", "metadata": {"a": "\\u0000 é 😀"}}
    answer = await http.post("/v1/fine_tuning/jobs", json=body)
    assert answer.json()["error"]["code"] == "file_not_found"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fine_tuning/jobs/%00",
        "/v1/fine_tuning/jobs?model=%00",
        "/v1/fine_tuning/jobs?metadata[%00]=a",
        "/v1/files/%00/content",
        "/v1/models/ft:%00",
        "/hf/default/x%00/resolve/main/a",
    ],
)
async def test_a_nul_in_an_address_is_a_bad_request(http: httpx2.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    code = "invalid_value" if "?" in path else "invalid_path"
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert answer.headers["x-request-id"]


async def test_steps_beyond_what_a_job_can_have_find_nothing(
    http: httpx2.AsyncClient, data_file: str, base_model: str
) -> None:
    body = {"model": base_model, "training_file": data_file}
    job = (await http.post("/v1/fine_tuning/jobs", json=body)).json()["id"]
    answer = await http.get(
        f"/v1/fine_tuning/jobs/{job}/metrics",
        params={"step_from": str(-(10**30)), "step_to": str(10**30)},
    )
    assert (answer.status_code, answer.json()["data"]) == (200, {})


async def test_an_empty_idempotency_key_is_refused(
    http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    answer = await http.post(JOBS, json=body, headers={"idempotency-key": ""})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
