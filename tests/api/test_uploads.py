"""Uploads in parts, through the stock client and over bare HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING, Any

import pytest
from openai import BadRequestError, ConflictError
from sqlalchemy import text

from core.files import expiry, uploads
from tests.api.conftest import CHAT, jsonl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx2
    from openai import AsyncOpenAI
    from openai.types import Upload

    from tests.api.conftest import Service

LINES = jsonl(CHAT)
PIECES = [LINES[:100], LINES[100:350], LINES[350:]]


async def announce(client: AsyncOpenAI, size: int = len(LINES), **more: Any) -> Upload:
    return await client.uploads.create(
        bytes=size, filename="t.jsonl", mime_type="text/jsonl", purpose="fine-tune", **more
    )


async def send(client: AsyncOpenAI, upload: Upload, pieces: list[bytes] = PIECES) -> list[str]:
    """Send all pieces at once; returns their ids in the order of the pieces."""
    parts = await asyncio.gather(
        *[client.uploads.parts.create(upload_id=upload.id, data=piece) for piece in pieces]
    )
    return [part.id for part in parts]


async def stored(service: Service) -> tuple[int, int]:
    """How many files, and how many parts, lie in the store."""
    store = service.app.state.service.store
    files = [key async for key in store.list("files")]
    parts = [key async for key in store.list("uploads")]
    return len(files), len(parts)


async def test_parts_sent_at_once_become_one_file(service: Service, client: AsyncOpenAI) -> None:
    upload = await announce(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (upload.status, upload.bytes) == ("pending", len(LINES))
    assert upload.expires_at == upload.created_at + 3600
    ids = await send(client, upload)
    done = await client.uploads.complete(
        upload_id=upload.id,
        part_ids=ids,
        md5=hashlib.md5(LINES).hexdigest(),
        extra_body={"ext": {"sha256": hashlib.sha256(LINES).hexdigest()}},
    )
    assert done.status == "completed"
    assert done.file is not None
    assert done.file.status == "processed"
    assert done.file.expires_at == done.file.created_at + 3600
    assert (await client.files.content(done.file.id)).content == LINES
    assert await stored(service) == (1, 0)


async def test_the_stock_helper_uploads_a_file_in_chunks(
    client: AsyncOpenAI, tmp_path: Path
) -> None:
    rows = jsonl(CHAT) * 300
    path = tmp_path / "big.jsonl"
    path.write_bytes(rows)
    done = await client.uploads.upload_file_chunked(
        file=path,
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=100_000,
        md5=hashlib.md5(rows).hexdigest(),
    )
    assert done.file is not None
    assert done.file.filename == "big.jsonl"
    assert (await client.files.content(done.file.id)).content == rows


async def test_the_same_bytes_are_the_same_part_and_may_stand_twice(
    service: Service, client: AsyncOpenAI
) -> None:
    upload = await announce(client, 2 * len(LINES))
    ids = await send(client, upload, [LINES] * 5)
    assert len(set(ids)) == 1
    assert await stored(service) == (0, 1)
    done = await client.uploads.complete(upload_id=upload.id, part_ids=[ids[0], ids[0]])
    assert done.file is not None
    assert (await client.files.content(done.file.id)).content == LINES * 2


async def test_order_and_checksums_are_checked_and_may_be_mended(
    service: Service, client: AsyncOpenAI
) -> None:
    upload = await announce(client)
    ids = await send(client, upload)
    good = hashlib.sha256(LINES).hexdigest()
    for part_ids, more, code, param in (
        (ids[::-1], {"md5": hashlib.md5(LINES).hexdigest()}, "checksum_mismatch", "md5"),
        (ids[::-1], {"ext": {"sha256": good}}, "checksum_mismatch", "ext.sha256"),
        (ids, {"md5": "0" * 32}, "checksum_mismatch", "md5"),
        (ids, {"md5": "nonsense"}, "invalid_value", "md5"),
        (ids[:2], {}, "upload_size_mismatch", "part_ids"),
        ([], {}, "upload_size_mismatch", "part_ids"),
        ([*ids, "part_none"], {}, "part_not_found", "part_ids.3"),
    ):
        with pytest.raises(BadRequestError) as caught:
            await client.uploads.complete(upload_id=upload.id, part_ids=part_ids, extra_body=more)
        assert (caught.value.code, caught.value.param) == (code, param)
    assert await stored(service) == (0, 3)
    done = await client.uploads.complete(
        upload_id=upload.id, part_ids=ids, extra_body={"ext": {"sha256": good.upper()}}
    )
    assert done.status == "completed"


async def test_completing_twice_makes_one_file(service: Service, client: AsyncOpenAI) -> None:
    upload = await announce(client)
    ids = await send(client, upload)
    done = await asyncio.gather(
        *[client.uploads.complete(upload_id=upload.id, part_ids=ids) for _ in range(4)]
    )
    done.append(await client.uploads.complete(upload_id=upload.id, part_ids=ids))
    assert len({answer.file.id for answer in done if answer.file}) == 1
    assert all(answer.status == "completed" for answer in done)
    assert await stored(service) == (1, 0)


async def test_a_cancelled_upload_is_gone(service: Service, client: AsyncOpenAI) -> None:
    upload = await announce(client)
    ids = await send(client, upload)
    for _ in range(2):
        assert (await client.uploads.cancel(upload.id)).status == "cancelled"
    assert await stored(service) == (0, 0)
    for attempt in (
        client.uploads.parts.create(upload_id=upload.id, data=b"x"),
        client.uploads.complete(upload_id=upload.id, part_ids=ids),
    ):
        with pytest.raises(ConflictError) as caught:
            await attempt
        assert caught.value.code == "invalid_upload_state"


async def test_a_completed_upload_cannot_be_cancelled(client: AsyncOpenAI) -> None:
    upload = await announce(client)
    await client.uploads.complete(upload_id=upload.id, part_ids=await send(client, upload))
    with pytest.raises(ConflictError):
        await client.uploads.cancel(upload.id)


async def test_an_upload_expires_and_is_swept(
    service: Service, client: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    upload, other = await announce(client), await announce(client)
    ids = await send(client, upload)
    await send(client, other)
    store = service.app.state.service.store
    await store.put("uploads/upload_nobody/part_orphan", _once(b"of a process that died"))
    async with service.db.begin() as session:
        await session.execute(
            text("update uploads set expires_at = clock_timestamp() where public_id = :id"),
            {"id": upload.id},
        )
    form = {"files": {"data": ("upload", b"x")}}
    for swept in (False, True):
        if swept:
            await expiry.sweep(service.db, store)
            assert await stored(service) == (0, 3)  # the other's
        for path, more in (
            ("parts", form),
            ("complete", {"json": {"part_ids": ids}}),
            ("cancel", {}),
        ):
            answer = await http.post(f"/v1/uploads/{upload.id}/{path}", **more)
            assert answer.status_code == 410, (swept, path)
            assert answer.json()["error"]["code"] == "upload_expired"


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def test_a_part_over_the_limit_is_refused(
    service: Service,
    client: AsyncOpenAI,
    http: httpx2.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "PART_LIMIT_BYTES", 1000)
    upload = await announce(client)
    url = f"/v1/uploads/{upload.id}/parts"
    fits = await http.post(url, files={"data": ("upload", os.urandom(1000))})
    assert fits.status_code == 200
    over = await http.post(url, files={"data": ("upload", os.urandom(1001))})
    assert over.status_code == 413
    assert over.json()["error"]["code"] == "part_too_large"
    assert await stored(service) == (0, 1)


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"bytes": None}, 400, "missing_parameter", "bytes"),
        ({"bytes": "9"}, 400, "invalid_value", "bytes"),
        ({"bytes": True}, 400, "invalid_value", "bytes"),
        ({"bytes": -1}, 400, "invalid_value", "bytes"),
        ({"bytes": 1 << 62}, 413, "file_too_large", "bytes"),
        ({"filename": None}, 400, "missing_parameter", "filename"),
        ({"filename": 7}, 400, "invalid_value", "filename"),
        ({"filename": "t.zip"}, 415, "unsupported_media_type", "filename"),
        ({"mime_type": None}, 400, "missing_parameter", "mime_type"),
        ({"purpose": None}, 400, "missing_parameter", "purpose"),
        ({"purpose": "fine-tune-results"}, 400, "invalid_purpose", "purpose"),
        ({"expires_after": 9}, 400, "invalid_value", "expires_after"),
        (
            {"expires_after": {"anchor": "created_at", "seconds": 1}},
            400,
            "invalid_value",
            "expires_after.seconds",
        ),
    ],
)
async def test_a_wrong_announcement_is_refused(
    http: httpx2.AsyncClient, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    body = {"bytes": 9, "filename": "t.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    answer = await http.post("/v1/uploads", json=body | change)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


async def test_a_retried_announcement_is_the_same_upload(client: AsyncOpenAI) -> None:
    first = await announce(client)
    again = await announce(client, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == first.id
    assert (await announce(client)).id != first.id


async def test_a_bad_training_file_in_parts_says_where(client: AsyncOpenAI) -> None:
    content = LINES + b"oops\n"
    upload = await announce(client, len(content))
    ids = await send(client, upload, [content[:200], content[200:]])
    done = await client.uploads.complete(upload_id=upload.id, part_ids=ids)
    assert done.file is not None
    assert done.file.status == "error"
    assert str(done.file.status_details).startswith("line 13: bad_json")


@pytest.mark.parametrize("path", ["parts", "complete", "cancel"])
async def test_an_unknown_upload_is_missing(http: httpx2.AsyncClient, path: str) -> None:
    answer = await http.post(f"/v1/uploads/upload_none/{path}", json={"part_ids": []})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "upload_not_found"


async def test_another_projects_upload_is_missing(service: Service, client: AsyncOpenAI) -> None:
    upload = await announce(client)
    theirs = service.http(await service.key("rival"))
    for path, more in (
        ("parts", {"files": {"data": ("upload", b"x")}}),
        ("complete", {"json": {"part_ids": []}}),
        ("cancel", {}),
    ):
        answer = await theirs.post(f"/v1/uploads/{upload.id}/{path}", **more)
        assert answer.status_code == 404
