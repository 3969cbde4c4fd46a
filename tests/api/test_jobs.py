"""Jobs over HTTP, through the stock client where it has the call."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest

from core.db import checkpoints, claims, inspections, submissions, workers
from core.db.engine import driver_of
from core.db.files import FileRepository
from tests.api.conftest import BASE

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncOpenAI

    from tests.api.conftest import Service, Worker

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def body(data_file: str, base_model: str) -> dict[str, Any]:
    return {"model": base_model, "training_file": data_file}


async def test_a_stock_request_is_a_queued_lora_job(
    client: AsyncOpenAI, body: dict[str, Any]
) -> None:
    job = await client.fine_tuning.jobs.create(
        **body, suffix="support", seed=7, metadata={"team": "a"}, validation_file=None
    )
    assert (job.status, job.model, job.seed) == ("queued", BASE, 7)
    assert job.error is None
    assert job.result_files == []
    assert job.metadata == {"team": "a"}
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.method.supervised.adapter["type"] == "lora"  # type: ignore[union-attr]
    assert isinstance(job.hyperparameters.batch_size, int)
    name = job.ext["resolved"]["fine_tuned_model"]  # type: ignore[attr-defined]
    assert name == f"ft:{BASE}:acme:support:{job.id.removeprefix('ftjob-')}"
    again = await client.fine_tuning.jobs.retrieve(job.id)
    assert again.ext["queue"]["position"] == 1  # type: ignore[attr-defined]


async def test_strict_validation_accepts_what_we_send(
    service: Service, key: str, body: dict[str, Any], worker: Worker
) -> None:
    client = service.openai(key, _strict_response_validation=True)
    job = await client.fine_tuning.jobs.create(**body)
    claim = await worker.claim()
    await worker.step(claim, 1, train_loss=2.5)
    await worker.save(claim, 1, train_loss=2.5)
    assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "running"
    assert len((await client.fine_tuning.jobs.list_events(job.id)).data) >= 2
    assert len((await client.fine_tuning.jobs.checkpoints.list(job.id)).data) == 1
    assert (await client.models.list()).data
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "running"


async def test_unknown_keys_are_refused_by_path_inside_and_noted_outside(
    client: AsyncOpenAI, http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.fine_tuning.jobs.create(
            **body,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epoch": 2}}},  # type: ignore[typeddict-unknown-key]
        )
    assert refused.value.param == "method.supervised.hyperparameters.n_epoch"
    assert refused.value.code == "unknown_parameter"
    assert "n_epochs" in refused.value.response.json()["ext"]["hint"]
    with pytest.raises(openai.BadRequestError):
        await client.fine_tuning.jobs.create(**body, extra_body={"ext": {"prioritty": 1}})

    job = await client.fine_tuning.jobs.create(**body, extra_body={"brand_new": True})
    events = (await http.get(f"{JOBS}/{job.id}/events")).json()["data"]
    warned = [event for event in events if event["level"] == "warn"]
    assert any(event["data"]["param"] == "brand_new" for event in warned)


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": None}, 400, "missing_parameter", "model"),
        ({"model": "no/such"}, 400, "model_not_found", "model"),
        ({"model": "ft:no:such::thing"}, 400, "model_not_found", "model"),
        ({"training_file": "file-none"}, 400, "file_not_found", "training_file"),
        ({"validation_file": "file-none"}, 400, "file_not_found", "validation_file"),
        ({"suffix": ""}, 400, "invalid_value", "suffix"),
        ({"method": {"type": "magic"}}, 400, "unsupported_method", "method.type"),
        ({"method": {"type": "dpo"}}, 422, "unsupported_combination", "training_file"),
        ({"ext": {"compute": {"nodes": 2}}}, 422, "unsupported_combination", "ext.compute.nodes"),
        (
            {"ext": {"compute": {"micro_batch_tokens": 1}}},
            400,
            "invalid_value",
            "ext.compute.micro_batch_tokens",
        ),
        (
            {"ext": {"checkpoints": {"every_steps": 0}}},
            400,
            "invalid_value",
            "ext.checkpoints.every_steps",
        ),
        (
            {
                "method": {
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"max_steps": 10**30}},
                }
            },
            400,
            "invalid_value",
            "method.supervised.hyperparameters.max_steps",
        ),
        ({"ext": {"queue": "nobody"}}, 422, "unsupported_combination", "ext.queue"),
    ],
)
async def test_each_refusal_names_its_cause(
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    change: dict[str, Any],
    status: int,
    code: str,
    param: str,
) -> None:
    answer = await http.post(JOBS, json=body | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert (await http.get(JOBS)).json()["data"] == []


async def test_files_that_cannot_be_trained_on(
    service: Service, http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    async def refusal(**columns: Any) -> tuple[int, str]:
        file = await service.add_file(**columns)
        answer = await http.post(JOBS, json=body | {"training_file": file})
        return answer.status_code, answer.json()["error"]["code"]

    assert await refusal(status="error", status_details="bad") == (400, "invalid_training_file")
    assert await refusal(status="uploaded") == (409, "validation_pending")
    assert await refusal(purpose="batch") == (400, "invalid_purpose")


async def test_cancel_pause_and_resume_are_idempotent_and_refuse_ended_jobs(
    client: AsyncOpenAI, body: dict[str, Any], worker: Worker
) -> None:
    jobs = client.fine_tuning.jobs
    job = await jobs.create(**body)
    assert [(await jobs.pause(job.id)).status for _ in range(2)] == ["paused", "paused"]
    assert [(await jobs.resume(job.id)).status for _ in range(2)] == ["queued", "queued"]
    claim = await worker.claim()
    cancelled = await jobs.cancel(job.id)
    assert (cancelled.status, cancelled.ext["phase"]) == ("running", "cancelling")  # type: ignore[attr-defined]
    async with worker.db.begin() as session:
        assert await claims.yield_(session, claim) == "cancelled"
    assert [(await jobs.cancel(job.id)).status for _ in range(2)] == ["cancelled", "cancelled"]
    started = time.monotonic()
    with pytest.raises(openai.ConflictError) as refused:
        await jobs.resume(job.id)
    assert refused.value.code == "invalid_job_state"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert time.monotonic() - started < 0.4, "the client must not have retried"


async def test_a_finished_job_shows_its_result_and_is_a_model(
    client: AsyncOpenAI, body: dict[str, Any], worker: Worker, http: httpx2.AsyncClient
) -> None:
    job = await client.fine_tuning.jobs.create(**body)
    done = await finished(worker)
    job = await client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", done)
    assert job.trained_tokens == 1234
    assert job.ext["phase"] == "done"  # type: ignore[attr-defined]
    assert job.ext["artifacts"]["final_checkpoint"].startswith("ftckpt_")  # type: ignore[attr-defined]
    listed = {model.id: model.owned_by for model in (await client.models.list()).data}
    assert listed == {BASE: "base", done: "acme"}
    assert (await client.models.retrieve(BASE)).id == BASE
    assert (await client.models.retrieve(done)).ext["base"] == BASE  # type: ignore[attr-defined]

    # As a base: the adapter goes on from there.
    second = await client.fine_tuning.jobs.create(model=done, training_file=body["training_file"])
    spec = second.ext["resolved"]["spec"]  # type: ignore[attr-defined]
    assert (second.model, spec["model"]["name"]) == (done, BASE)
    assert spec["init_from"]["checkpoint"] == job.ext["artifacts"]["final_checkpoint"]  # type: ignore[attr-defined]

    assert (await client.models.delete(done)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve(done)
    with pytest.raises(openai.PermissionDeniedError):
        await client.models.delete(BASE)
    adapter = await http.get(f"{JOBS}/{job.id}/adapter")
    assert (adapter.status_code, adapter.json()["error"]["code"]) == (409, "not_ready")


async def test_a_job_starts_with_an_earlier_ones_optimizer_while_that_is_kept(
    client: AsyncOpenAI, body: dict[str, Any], worker: Worker
) -> None:
    await client.fine_tuning.jobs.create(**body)
    claim = await worker.claim()
    saved = await worker.save(claim, 6, final=True, train_loss=1.5)
    model = await client.models.retrieve(saved.name)
    name = model.ext["checkpoint_id"]  # type: ignore[attr-defined]
    start = {"ext": {"init_from": {"checkpoint": name, "optimizer": True}}}
    second = await client.fine_tuning.jobs.create(**body, extra_body=start)
    assert second.ext["resolved"]["spec"]["init_from"] == start["ext"]["init_from"]  # type: ignore[attr-defined]
    async with worker.db.begin() as session:
        await checkpoints.mark_resume_dropped(session, saved.id)
    with pytest.raises(openai.APIStatusError) as refused:
        await client.fine_tuning.jobs.create(**body, extra_body=start)
    assert refused.value.status_code == 410
    assert refused.value.param == "ext.init_from.optimizer"
    start["ext"]["init_from"]["optimizer"] = False
    await client.fine_tuning.jobs.create(**body, extra_body=start)


async def test_only_what_can_be_merged_is_asked_to_be(
    client: AsyncOpenAI, body: dict[str, Any]
) -> None:
    merged = {"ext": {"output": {"merge": True}}}
    job = await client.fine_tuning.jobs.create(**body, extra_body=merged)
    assert job.ext["resolved"]["spec"]["output"] == {"merge": True}  # type: ignore[attr-defined]
    prompt = {"type": "supervised", "supervised": {"adapter": {"type": "prompt"}}}
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await client.fine_tuning.jobs.create(**body, method=prompt, extra_body=merged)
    assert refused.value.param == "ext.output.merge"


async def finished(worker: Worker) -> str:
    """Run the next job to its end; the name of the model that it made."""
    claim = await worker.claim()
    await worker.step(claim, 6, train_loss=1.5, valid_loss=1.75)
    row = await worker.save(claim, 6, final=True, train_loss=1.5, valid_loss=1.75)
    name = str(claim.resolved["fine_tuned_model"])
    async with worker.db.begin() as session:
        await claims.move(session, claim, "running", "finishing")
        assert await claims.finish(
            session,
            claim,
            final_checkpoint_id=row.id,
            fine_tuned_model=name,
            result_file_id=None,
            trained_tokens=1234,
        )
    return name


async def test_a_failed_job_tells_why_and_a_healthy_one_has_null(
    client: AsyncOpenAI, body: dict[str, Any], worker: Worker
) -> None:
    job = await client.fine_tuning.jobs.create(**body)
    claim = await worker.claim()
    error = {
        "code": "non_finite_loss",
        "message": "the loss became NaN at step 3",
        "param": None,
        "category": "user_config",
        "retriable": False,
        "hint": "lower learning_rate",
    }
    async with worker.db.begin() as session:
        assert await claims.fail(session, claim, error=error, retryable=False) == "failed"
    job = await client.fine_tuning.jobs.retrieve(job.id)
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "non_finite_loss")
    assert job.ext["failure"] == {  # type: ignore[attr-defined]
        "category": "user_config",
        "code": "non_finite_loss",
        "retriable": False,
        "hint": "lower learning_rate",
    }


async def test_filters_of_the_list(
    client: AsyncOpenAI, body: dict[str, Any], worker: Worker
) -> None:
    jobs = client.fine_tuning.jobs
    plain = await jobs.create(**body)
    blue = await jobs.create(**body, metadata={"colour": "blue", "n": "1"})
    red = await jobs.create(**body, metadata={"colour": "red"})
    await jobs.cancel(red.id)

    async def ids(**query: Any) -> list[str]:
        return [job.id async for job in jobs.list(extra_query=query)]

    assert [job.id async for job in jobs.list()] == [red.id, blue.id, plain.id]
    assert [job.id async for job in jobs.list(metadata={"colour": "blue"})] == [blue.id]
    assert await ids(metadata="null") == [plain.id]
    assert await ids(status="cancelled") == [red.id]
    assert await ids(method="dpo") == []
    assert await ids(model=BASE, order="asc") == [plain.id, blue.id, red.id]
    assert await ids(created_after=time.time() + 60) == []
    with pytest.raises(openai.BadRequestError, match="status"):
        await ids(status="runing")


async def test_pages_of_one_never_repeat_miss_or_go_on_for_ever(
    client: AsyncOpenAI, body: dict[str, Any], worker: Worker
) -> None:
    """While others insert: what was there at the start comes once each, and the walk ends."""
    jobs = client.fine_tuning.jobs
    made = [(await jobs.create(**body)).id for _ in range(5)]
    seen: list[str] = []
    async for job in jobs.list(limit=1):
        seen.append(job.id)
        if len(seen) < 8:
            await jobs.create(**body)
    assert seen == made[::-1]

    claim = await worker.claim()
    for step in range(1, 4):
        await worker.save(claim, step)
    steps: list[int] = []
    async for saved in jobs.checkpoints.list(claim.public_id, limit=1):
        steps.append(saved.step_number)
        await worker.save(claim, 100 + len(steps))
    assert steps == [3, 2, 1]

    events: list[int] = []
    async for event in jobs.list_events(claim.public_id, limit=1):
        events.append(event.ext["seq"])  # type: ignore[attr-defined]
        await worker.step(claim, 200 + len(events))
    assert events == list(range(events[0], 0, -1))


async def test_limits_are_clamped_and_cursors_are_checked(
    http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    for _ in range(2):
        await http.post(JOBS, json=body)
    assert len((await http.get(JOBS, params={"limit": "0"})).json()["data"]) == 1
    assert len((await http.get(JOBS, params={"limit": "100000"})).json()["data"]) == 2
    for query in ({"limit": "ten"}, {"after": "ftjob-none"}, {"order": "sideways"}):
        answer = await http.get(JOBS, params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(query)))


async def test_dry_run_agrees_with_create_and_stores_nothing(
    http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    wanted = body | {"seed": 3}
    rehearsed = (await http.post(f"{JOBS}/dry_run", json=wanted)).json()
    assert rehearsed["valid"]
    assert rehearsed["estimate"]["steps"] == 6
    assert rehearsed["preflight"] is None
    assert [warning["code"] for warning in rehearsed["warnings"]] == ["data_not_inspected"]
    assert (await http.get(JOBS)).json()["data"] == []
    made = (await http.post(JOBS, json=wanted)).json()
    resolved = dict(made["ext"]["resolved"])
    del resolved["facts"], resolved["fine_tuned_model"]
    assert resolved == rehearsed["resolved"]

    invalid = await http.post(f"{JOBS}/dry_run", json=body | {"model": "no/such"})
    assert invalid.status_code == 200
    assert not invalid.json()["valid"]
    assert invalid.json()["problems"][0]["code"] == "model_not_found"
    assert (await http.post(f"{JOBS}/dry_run", content=b"{")).status_code == 400


async def test_a_dry_run_tells_what_a_worker_finds_in_the_files(
    http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    async with worker.db.begin() as session:
        await workers.upsert(
            session,
            name="w1",
            host="h",
            pid=1,
            queues=["default"],
            devices=[{"kind": "cpu"}],
            versions={},
            cached_models=[],
        )
    problem = {"code": "no_trainable_tokens", "path": "training_file", "message": "nothing"}
    found = {"preflight": {"rows": 4}, "problems": [problem], "warnings": []}

    async def answer() -> None:
        while True:
            async with worker.db.begin() as session:
                question = await inspections.take(session, ["default"], 60)
                if question is not None:
                    assert question.spec["model"]["name"] == BASE
                    await inspections.answer(session, question.id, found)
                    return
            await asyncio.sleep(0.02)

    answering = asyncio.create_task(answer())
    rehearsed = (await http.post(f"{JOBS}/dry_run", json=body)).json()
    await answering
    assert not rehearsed["valid"]
    assert rehearsed["problems"] == [problem]
    assert rehearsed["preflight"] == {"rows": 4}
    assert rehearsed["resolved"] is not None


async def test_an_etag_spares_the_body_and_prefer_waits_for_a_change(
    http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    made = (await http.post(JOBS, json=body)).json()
    path = f"{JOBS}/{made['id']}"
    first = await http.get(path)
    known = {"if-none-match": first.headers["etag"]}
    assert (await http.get(path, headers=known)).status_code == 304

    waiting = asyncio.create_task(http.get(path, headers={"prefer": "wait=20"}))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await worker.claim()
    changed = await waiting
    assert changed.json()["status"] == "running"
    assert (await http.get(path, headers=known)).status_code == 200
    same = await http.get(path, headers={"prefer": "wait=1"})
    assert same.json()["status"] == "running"


async def test_a_manual_start_waits_for_resume(
    http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    made = (await http.post(JOBS, json=body | {"ext": {"start": "manual"}})).json()
    assert (made["status"], made["ext"]["phase"]) == ("queued", "validated")
    assert made["ext"]["queue"]["reason"] == "manual"
    with pytest.raises(AssertionError, match="no job is waiting"):
        await worker.claim()
    resumed = (await http.post(f"{JOBS}/{made['id']}/resume")).json()
    assert resumed["ext"]["phase"] == "waiting_for_capacity"
    assert (await worker.claim()).public_id == made["id"]


async def test_what_can_be_changed_afterwards(
    http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    path = f"{JOBS}/{(await http.post(JOBS, json=body)).json()['id']}"
    changed = await http.patch(path, json={"metadata": {"a": "b"}, "ext": {"priority": 5}})
    assert (changed.json()["metadata"], changed.json()["ext"]["priority"]) == ({"a": "b"}, 5)
    for wrong in ({"model": "x"}, {"ext": {"attempts": 9}}, {"metadata": {"a": 1}}):
        assert (await http.patch(path, json=wrong)).status_code == 400
    await http.post(f"{path}/cancel")
    assert (await http.patch(path, json={"metadata": None})).json()["metadata"] is None
    assert (await http.patch(path, json={"ext": {"priority": 1}})).status_code == 409


async def test_save_now_asks_the_worker(
    http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    path = f"{JOBS}/{(await http.post(JOBS, json=body)).json()['id']}/checkpoints"
    assert (await http.post(path)).status_code == 409
    claim = await worker.claim()
    assert (await http.post(path)).status_code == 202
    async with worker.db.begin() as session:
        orders = await claims.beat(session, claim, ttl_s=60.0)
    assert orders is not None
    assert orders.checkpoint is not None


async def test_a_file_deleted_while_a_job_is_submitted_is_on_no_job(
    service: Service,
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The delete comes between the submission's look at its files and its insert."""
    looked = submissions.references

    async def look_then_lose(*args: Any, **kwargs: Any) -> submissions.References:
        found = await looked(*args, **kwargs)
        monkeypatch.setattr(submissions, "references", looked)
        gone = await http.delete(f"/v1/files/{body['training_file']}")
        assert gone.status_code == 200
        return found

    for headers in ({}, {"idempotency-key": "k"}):
        file = await service.add_file()
        body["training_file"] = file
        monkeypatch.setattr(submissions, "references", look_then_lose)
        answer = await http.post(JOBS, json=body, headers=headers)
        assert answer.json()["error"]["code"] == "file_not_found"
        assert answer.json()["error"]["param"] == "training_file"
    assert (await http.get(JOBS)).json()["data"] == []


async def test_a_delete_under_way_is_waited_for(
    service: Service, http: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    """Neither the file nor the job wins by luck: who locks the file first does."""
    project = await service.project()
    async with service.db.begin() as session:
        assert await FileRepository(session, project.id).delete(body["training_file"]) is not None
        submitting = asyncio.create_task(http.post(JOBS, json=body))
        await asyncio.sleep(0.3)
        assert not submitting.done(), "the insert waits for the delete"
    assert (await submitting).json()["error"]["code"] == "file_not_found"

    kept = await service.add_file()
    async with service.db.begin() as session:
        driver = await driver_of(session)
        await driver.execute("select from files where public_id = %s for key share", (kept,))
        deleting = asyncio.create_task(http.delete(f"/v1/files/{kept}"))
        await asyncio.sleep(0.3)
        assert not deleting.done(), "a delete waits for a submission that has the file"
        assert (await http.post(JOBS, json=body | {"training_file": kept})).status_code == 200
    assert (await deleting).json()["error"]["code"] == "file_in_use"


async def test_a_retry_that_waits_has_a_failure_behind_it_and_no_error(
    client: AsyncOpenAI, http: httpx2.AsyncClient, body: dict[str, Any], worker: Worker
) -> None:
    job = await client.fine_tuning.jobs.create(**body)
    error = {"code": "store_unavailable", "message": "the store is away", "retriable": True}
    claim = await worker.claim()
    async with worker.db.begin() as session:
        assert await claims.fail(session, claim, error=error, retryable=True) == "queued"
    for shown in (
        (await http.get(f"{JOBS}/{job.id}")).json(),
        (await http.get(JOBS)).json()["data"][0],
    ):
        assert (shown["status"], shown["error"]) == ("queued", None)
        assert shown["ext"]["failure"]["code"] == "store_unavailable"
    cancelled = (await http.post(f"{JOBS}/{job.id}/cancel")).json()
    assert (cancelled["status"], cancelled["error"]) == ("cancelled", None)
