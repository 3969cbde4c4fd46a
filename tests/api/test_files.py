"""Files through the stock client and over bare HTTP, against the real service."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import os
import time
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from openai import BadRequestError, ConflictError, NotFoundError

from core.files import expiry
from tests.api.conftest import CHAT, jsonl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2
    from openai import AsyncOpenAI
    from openai.types import FileObject

    from tests.api.conftest import Service, Worker

CONTENT = jsonl(CHAT)
BOUNDARY = "frontier"


def form(*parts: tuple[str, str | None, bytes]) -> dict[str, Any]:
    """A multipart body, in exactly this order: (name, filename, content)."""
    body = b""
    for name, filename, content in parts:
        more = "" if filename is None else f'; filename="{filename}"'
        head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return {
        "content": body + f"--{BOUNDARY}--\r\n".encode(),
        "headers": {"content-type": f"multipart/form-data; boundary={BOUNDARY}"},
    }


async def upload(
    client: AsyncOpenAI, content: bytes = CONTENT, name: str = "t.jsonl"
) -> FileObject:
    return await client.files.create(file=(name, content), purpose="fine-tune")


async def stored(service: Service) -> list[str]:
    store = service.app.state.service.store
    return [key async for key in store.list("files")]


async def test_a_file_is_stored_hashed_and_validated(client: AsyncOpenAI) -> None:
    before = int(time.time())
    file = await upload(client)
    assert file.status == "processed"
    assert file.bytes == len(CONTENT)
    assert file.filename == "t.jsonl"
    assert before - 1 <= file.created_at <= time.time() + 1
    ext = file.model_extra["ext"]  # type: ignore[index]
    assert ext["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert (ext["format"], ext["rows"]) == ("chat", 12)
    assert ext["validation"]["valid"] is True
    assert await client.files.retrieve(file.id) == file
    assert (await client.files.wait_for_processing(file.id)).status == "processed"
    assert (await client.files.content(file.id)).content == CONTENT


async def test_a_bad_file_says_where_and_is_kept(
    client: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    file = await upload(client, CONTENT + b'{"messages": "secret words"}\n')
    assert file.status == "error"
    assert file.status_details == "line 13: wrong_type: a list of messages is expected"
    report = (await http.get(f"/v1/files/{file.id}/validation")).json()["validation"]
    assert report["valid"] is False
    assert report["problems"] == [
        {
            "line": 13,
            "path": "messages",
            "code": "wrong_type",
            "severity": "error",
            "message": "a list of messages is expected",
        }
    ]
    assert "secret" not in json.dumps(report)


def csv_file() -> bytes:
    return b"text,label\n" + b"".join(b"row %d,%d\n" % (i, i % 3) for i in range(20))


def parquet_file() -> bytes:
    sink = io.BytesIO()
    rows = [{"text": f"row {i}", "label": i % 3} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("t.csv", csv_file(), "text/csv"),
        ("t.parquet", parquet_file(), "application/vnd.apache.parquet"),
        (
            "T.JSONL.GZ",
            gzip.compress(jsonl([{"text": f"row {i}", "label": i % 3} for i in range(20)])),
            "application/gzip",
        ),
    ],
)
async def test_other_kinds_of_files_are_validated_too(
    client: AsyncOpenAI, http: httpx2.AsyncClient, name: str, content: bytes, kind: str
) -> None:
    file = await upload(client, content, name)
    assert file.status == "processed", file.status_details
    ext = file.model_extra["ext"]  # type: ignore[index]
    assert (ext["format"], ext["rows"], ext["labels"]) == ("classification", 20, ["0", "1", "2"])
    answer = await http.get(f"/v1/files/{file.id}/content")
    assert answer.content == content
    assert answer.headers["content-type"].split(";")[0] == kind
    assert "content-encoding" not in answer.headers


async def test_a_damaged_parquet_file_fails_alone(client: AsyncOpenAI) -> None:
    file = await upload(client, parquet_file()[:-30], "t.parquet")
    assert file.status == "error"
    assert "bad_parquet" in str(file.status_details)


async def test_only_training_files_are_validated(client: AsyncOpenAI) -> None:
    file = await client.files.create(file=("notes.html", b"<script>"), purpose="user_data")
    assert file.status == "processed"
    assert file.model_extra["ext"]["validation"] is None  # type: ignore[index]
    answer = await client.files.with_raw_response.content(file.id)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_purpose_may_come_behind_the_file(http: httpx2.AsyncClient) -> None:
    body = form(
        ("file", "t.jsonl", CONTENT),
        ("purpose", None, b"fine-tune"),
        ("expires_after[anchor]", None, b"created_at"),
        ("expires_after[seconds]", None, b"3600"),
    )
    answer = (await http.post("/v1/files", **body)).json()
    assert answer["ext"]["validation"]["valid"] is True
    assert answer["expires_at"] - answer["created_at"] == 3600


async def test_expires_after_as_the_stock_client_sends_it(client: AsyncOpenAI) -> None:
    file = await client.files.create(
        file=("t.jsonl", CONTENT),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert file.expires_at == file.created_at + 7200


PART = ("file", "t.jsonl", CONTENT)
PURPOSE = ("purpose", None, b"fine-tune")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (form(PART), 400, "missing_parameter", "purpose"),
        (form(PURPOSE), 400, "missing_parameter", "file"),
        (form(("purpose", None, b"training"), PART), 400, "invalid_purpose", "purpose"),
        (form(PART, ("purpose", None, b"fine-tune-results")), 400, "invalid_purpose", "purpose"),
        (
            form(PURPOSE, ("file", "t.exe", CONTENT)),
            415,
            "unsupported_media_type",
            "filename",
        ),
        (
            form(("file", "t.txt", CONTENT), PURPOSE),
            415,
            "unsupported_media_type",
            "filename",
        ),
        (form(PART, PURPOSE, PART), 400, "invalid_value", "file"),
        (
            form(PART, PURPOSE, ("expires_after[seconds]", None, b"3600")),
            400,
            "invalid_value",
            "expires_after.anchor",
        ),
        (
            form(
                PART,
                PURPOSE,
                ("expires_after[anchor]", None, b"created_at"),
                ("expires_after[seconds]", None, b"60"),
            ),
            400,
            "invalid_value",
            "expires_after.seconds",
        ),
        (form(("purpose", None, b"x" * 100_000), PART), 400, "invalid_multipart", None),
        (form(*[("f", None, b"")] * 200, PART), 400, "invalid_multipart", None),
        (
            {**form(PURPOSE, PART), "content": form(PURPOSE, PART)["content"][:-60]},
            400,
            "invalid_multipart",
            None,
        ),
        ({**form(PURPOSE, PART), "content": b"no form"}, 400, "invalid_multipart", None),
        ({"json": {"purpose": "fine-tune"}}, 415, "unsupported_media_type", None),
    ],
)
async def test_a_wrong_form_is_refused_and_leaves_nothing(
    service: Service,
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
) -> None:
    answer = await http.post("/v1/files", **body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert await stored(service) == []


async def test_a_compressed_body_is_refused(http: httpx2.AsyncClient) -> None:
    body = form(PURPOSE, PART)
    body["headers"]["content-encoding"] = "gzip"
    assert (await http.post("/v1/files", **body)).status_code == 415


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd.jsonl", "passwd.jsonl"),
        ("C:\\\\data\\\\t.jsonl", "t.jsonl"),
        ("a\x00b\x07.jsonl", "ab.jsonl"),
        ("é" * 300 + ".jsonl", "é" * 249 + ".jsonl"),
    ],
)
async def test_odd_names_are_made_harmless(http: httpx2.AsyncClient, name: str, shown: str) -> None:
    made = (await http.post("/v1/files", **form(PURPOSE, ("file", name, CONTENT)))).json()
    assert made["filename"] == shown
    answer = await http.get(f"/v1/files/{made['id']}/content")
    assert answer.content == CONTENT
    assert "\n" not in answer.headers["content-disposition"]


async def test_a_file_over_the_limit_is_refused_and_leaves_nothing(
    service: Service, http: httpx2.AsyncClient
) -> None:
    running = service.app.state.service
    object.__setattr__(
        running, "settings", running.settings.model_copy(update={"max_file_bytes": 1000})
    )
    answer = await http.post("/v1/files", **form(PURPOSE, PART))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "file_too_large"
    assert await stored(service) == []


async def test_a_client_that_vanishes_leaves_nothing(
    service: Service, http: httpx2.AsyncClient
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield form(PURPOSE, PART)["content"][:-60]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await http.post("/v1/files", content=broken(), headers=form()["headers"])
    folder = service.settings.resolved_home() / "artifacts"
    async with asyncio.timeout(10):
        while [path for path in folder.rglob("*") if path.is_file()]:
            await asyncio.sleep(0.02)
    assert await stored(service) == []


# Retries


async def test_a_first_attempt_always_creates(client: AsyncOpenAI) -> None:
    assert (await upload(client)).id != (await upload(client)).id


async def test_a_retry_gets_the_same_file_back(service: Service, client: AsyncOpenAI) -> None:
    async def retry(
        who: AsyncOpenAI = client, content: bytes = CONTENT, name: str = "t.jsonl"
    ) -> str:
        file = await who.files.create(
            file=(name, content),
            purpose="fine-tune",
            extra_headers={"x-stainless-retry-count": "1"},
        )
        return file.id

    first = await upload(client)
    assert await retry() == first.id
    assert len(await stored(service)) == 1
    assert await retry(name="other.jsonl") != first.id
    assert await retry(content=CONTENT + b"\n") != first.id
    assert await retry(service.openai(await service.key("rival"))) != first.id


async def test_an_idempotency_key_gets_the_same_file_back(http: httpx2.AsyncClient) -> None:
    body = form(PURPOSE, PART)
    body["headers"]["idempotency-key"] = "k1"
    first = await http.post("/v1/files", **body)
    again = await http.post("/v1/files", **body)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = form(PURPOSE, ("file", "t.jsonl", CONTENT + b"\n"))
    other["headers"]["idempotency-key"] = "k1"
    assert (await http.post("/v1/files", **other)).status_code == 422


# Lists


async def test_pages_of_one_end_and_lose_nothing(client: AsyncOpenAI) -> None:
    made = [(await upload(client)).id for _ in range(4)]
    seen = []
    async for file in client.files.list(limit=1):
        seen.append(file.id)
        if len(seen) == 2:
            await upload(client)  # newer than the cursor: shifts nothing
            await client.files.delete(file.id)  # a cursor that is gone still holds its place
    assert seen == made[::-1]


async def test_lists_are_ordered_and_filtered(
    client: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    first, second = await upload(client), await upload(client)
    other = await client.files.create(file=("x", b"x"), purpose="user_data")
    ascending = [file.id async for file in client.files.list(order="asc", purpose="fine-tune")]
    assert ascending == [first.id, second.id]
    assert [file.id async for file in client.files.list(purpose="user_data")] == [other.id]
    page = (await http.get("/v1/files", params={"limit": 2})).json()
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, other.id, second.id)
    assert (await http.get("/v1/files", params={"after": "file-x"})).status_code == 400
    assert (await http.get("/v1/files", params={"limit": "x"})).status_code == 400


# Deleting and expiring


async def test_a_deleted_file_is_gone_everywhere(service: Service, client: AsyncOpenAI) -> None:
    file = await upload(client)
    deleted = await client.files.delete(file.id)
    assert deleted.deleted is True
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(NotFoundError) as caught:
            await call(file.id)
        assert caught.value.code == "file_not_found"
    assert [found.id async for found in client.files.list()] == []
    assert await stored(service) == []


async def test_a_file_in_use_stays_until_its_job_is_over(
    service: Service, client: AsyncOpenAI, base_model: str
) -> None:
    training, held_out = await upload(client), await upload(client)
    job = await client.fine_tuning.jobs.create(
        model=base_model, training_file=training.id, validation_file=held_out.id
    )
    for file in (training, held_out):
        with pytest.raises(ConflictError) as caught:
            await client.with_options(max_retries=0).files.delete(file.id)
        assert caught.value.code == "file_in_use"
        assert caught.value.response.headers["x-should-retry"] == "false"
    await client.fine_tuning.jobs.cancel(job.id)
    await client.files.delete(training.id)


async def test_an_expired_file_is_gone_and_swept(
    service: Service, client: AsyncOpenAI, http: httpx2.AsyncClient, worker: Worker, base_model: str
) -> None:
    kept, used = await upload(client), await upload(client)
    job = await client.fine_tuning.jobs.create(model=base_model, training_file=used.id)
    await age(service, kept.id, used.id)
    for path in ("", "/content", "/validation"):
        answer = await http.get(f"/v1/files/{kept.id}{path}")
        assert answer.status_code == 410
        assert answer.json()["error"]["code"] == "file_expired"
    assert [file.id async for file in client.files.list()] == []
    store = service.app.state.service.store
    await expiry.sweep(service.db, store)
    assert [key.rsplit("/", 1)[-1] for key in await stored(service)] == [used.id]
    assert (await http.get(f"/v1/files/{kept.id}")).status_code == 410
    await client.fine_tuning.jobs.cancel(job.id)
    await expiry.sweep(service.db, store)
    assert await stored(service) == []


async def age(service: Service, *files: str) -> None:
    """Let the time of these files be over."""
    from sqlalchemy import text

    async with service.db.begin() as session:
        await session.execute(
            text("update files set expires_at = clock_timestamp() where public_id = any(:ids)"),
            {"ids": list(files)},
        )


# Downloads


async def test_ranges_heads_and_conditions(client: AsyncOpenAI, http: httpx2.AsyncClient) -> None:
    file = await upload(client)
    url = f"/v1/files/{file.id}/content"
    size, digest = len(CONTENT), hashlib.sha256(CONTENT).digest()
    whole = await http.get(url)
    head = await http.head(url)
    assert head.status_code == 200
    assert head.content == b""
    volatile = {"date", "x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in volatile} == {
        k: v for k, v in whole.headers.items() if k not in volatile
    }
    assert whole.headers["etag"] == f'"{digest.hex()}"'
    assert whole.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
    assert whole.headers["content-length"] == str(size)
    assert whole.headers["accept-ranges"] == "bytes"
    for asked, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        (f"bytes={size - 5}-", size - 5, size),
        (f"bytes=5-{size * 9}", 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{size * 9}", 0, size),
    ):
        part = await http.get(url, headers={"range": asked})
        assert part.status_code == 206, asked
        assert part.content == CONTENT[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for asked in (f"bytes={size}-", f"bytes={size}-{size + 5}", "bytes=-0"):
        refused = await http.get(url, headers={"range": asked})
        assert refused.status_code == 416, asked
        assert refused.headers["content-range"] == f"bytes */{size}"
        assert refused.json()["error"]["code"] == "range_not_satisfiable"
    for asked in ("bytes=0-1,3-4", "bytes=9-3", "lines=1-2", "bytes=-", "bytes=a-b"):
        ignored = await http.get(url, headers={"range": asked})
        assert ignored.status_code == 200, asked
        assert ignored.content == CONTENT
    for tag, status in (
        (whole.headers["etag"], 304),
        ("W/" + whole.headers["etag"], 304),
        ('"x", ' + whole.headers["etag"], 304),
        ("*", 304),
        ('"x"', 200),
    ):
        assert (await http.get(url, headers={"if-none-match": tag})).status_code == status
    same = {"range": "bytes=0-3", "if-range": whole.headers["etag"]}
    assert (await http.get(url, headers=same)).status_code == 206
    assert (await http.get(url, headers={**same, "if-range": '"x"'})).status_code == 200


async def test_a_download_survives_three_interruptions(
    client: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    content = os.urandom(3_000_000)
    file = await client.files.create(file=("x.bin", content), purpose="user_data")
    got = b""
    for _ in range(3):
        async with http.stream(
            "GET", f"/v1/files/{file.id}/content", headers={"range": f"bytes={len(got)}-"}
        ) as answer:
            async for chunk in answer.aiter_bytes(100_000):
                got += chunk
                break
    rest = await http.get(f"/v1/files/{file.id}/content", headers={"range": f"bytes={len(got)}-"})
    assert got + rest.content == content


async def test_an_empty_file_has_no_ranges(client: AsyncOpenAI, http: httpx2.AsyncClient) -> None:
    file = await client.files.create(file=("x", b""), purpose="user_data")
    assert (await http.get(f"/v1/files/{file.id}/content")).content == b""
    answer = await http.get(f"/v1/files/{file.id}/content", headers={"range": "bytes=0-"})
    assert answer.status_code == 416


async def test_bytes_that_are_missing_are_an_error_not_a_short_answer(
    service: Service, client: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    file = await upload(client)
    await service.app.state.service.store.delete((await stored(service))[0])
    answer = await http.get(f"/v1/files/{file.id}/content")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "artifact_not_found"


async def test_attacks_are_answered_with_a_line(client: AsyncOpenAI) -> None:
    deep = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    for bad, code in (
        (deep, "bad_json"),
        (b'{"text": "' + b"x" * (2 << 20) + b'"}\n', "too_long"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "bad_json"),
        (b'{"text": "\\ud800"}\n', "not_utf8"),
        (b'{"text": "\\u0000"}\n', "wrong_type"),
    ):
        file = await upload(client, CONTENT + bad)
        assert file.status == "error"
        assert str(file.status_details).startswith(f"line 13: {code}"), file.status_details


async def test_job_creation_refuses_a_file_in_error(client: AsyncOpenAI, base_model: str) -> None:
    bad = await upload(client, b"oops\n")
    with pytest.raises(BadRequestError):
        await client.fine_tuning.jobs.create(model=base_model, training_file=bad.id)


@pytest.mark.slow
async def test_memory_stays_flat_while_300_mb_arrive(
    service: Service, client: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await upload(client)
    row = {**CHAT[0], "pad": "x" * 100_000}
    block = jsonl([row]) * 10
    count = 300
    head, tail = form(PURPOSE, ("file", "big.jsonl", b"|"))["content"].split(b"|")
    process = psutil.Process()
    before, peak = process.memory_info().rss, 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal peak
        yield head
        for _ in range(count):
            yield block
            peak = max(peak, process.memory_info().rss)
        yield tail

    answer = await http.post("/v1/files", content=body(), headers=form()["headers"], timeout=170)
    made = answer.json()
    assert made["bytes"] == len(block) * count > 300_000_000
    assert made["ext"]["rows"] == count * 10
    assert peak - before < 64 << 20
