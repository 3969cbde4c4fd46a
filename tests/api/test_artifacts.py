"""What can be taken out of a checkpoint, how, and by which client."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.api.conftest import EXPORT
from tests.api.test_jobs import JOBS

if TYPE_CHECKING:
    from pathlib import Path

    import httpx2

    from tests.api.conftest import Service, Worker

WEIGHTS = EXPORT["export/adapter_model.safetensors"]
PUBLIC = {
    path.removeprefix("export/"): content
    for path, content in EXPORT.items()
    if path.startswith("export/")
}


@pytest_asyncio.fixture
async def job(http: httpx2.AsyncClient, data_file: str, base_model: str, worker: Worker) -> str:
    """A running job with exports at steps 2 (the best), 4 and 6."""
    body = {"model": base_model, "training_file": data_file}
    made: str = (await http.post(JOBS, json=body)).json()["id"]
    claim = await worker.claim()
    for step, loss in ((2, 1.0), (4, 1.5), (6, 2.0)):
        await worker.save(claim, step, train_loss=loss, valid_loss=loss)
    return made


async def test_checkpoints_by_id_and_by_nickname(http: httpx2.AsyncClient, job: str) -> None:
    path = f"{JOBS}/{job}/checkpoints"
    listed = (await http.get(path)).json()["data"]
    assert [row["step_number"] for row in listed] == [6, 4, 2]
    assert [row["ext"]["is_best"] for row in listed] == [False, False, True]
    assert listed[0]["metrics"] == {"step": 6, "train_loss": 2.0, "valid_loss": 2.0}
    assert listed[0]["ext"]["kinds"] == ["export", "resume"]
    assert listed[0]["ext"]["adapter_sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    for which, step in (("latest", 6), ("best", 2), ("step-4", 4), (listed[1]["id"], 4)):
        assert (await http.get(f"{path}/{which}")).json()["step_number"] == step
    assert (await http.get(f"{path}/step-5")).status_code == 404


async def test_the_manifest_lists_the_export_and_never_the_resume_half(
    http: httpx2.AsyncClient, job: str
) -> None:
    path = f"{JOBS}/{job}/checkpoints/latest/files"
    files = {file["path"]: file for file in (await http.get(path)).json()["data"]}
    assert set(files) == set(PUBLIC)
    for name, content in PUBLIC.items():
        answer = await http.get(f"{path}/{name}")
        assert answer.content == content
        assert files[name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert answer.headers["etag"] == f'"{files[name]["sha256"]}"'
    for name in ("resume/optimizer.pt", "../resume/optimizer.pt", "optimizer.pt", "manifest.json"):
        answer = await http.get(f"{path}/{name.replace('/', '%2F')}")
        assert answer.status_code in (400, 404), name
        assert b"pickled" not in answer.content


@pytest.mark.parametrize(
    "path", ["..%2f..%2fx", "%2e%2e/x", "a//b", "%00", "a%5cb", "%2fetc%2fpasswd", "a" * 300]
)
async def test_paths_that_try_to_climb_get_nowhere(
    http: httpx2.AsyncClient, job: str, path: str
) -> None:
    answer = await http.get(f"{JOBS}/{job}/checkpoints/latest/files/{path}")
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["code"] in ("invalid_path", "file_not_found")


async def test_a_download_broken_three_times_is_whole_in_the_end(
    http: httpx2.AsyncClient, job: str
) -> None:
    path = f"{JOBS}/{job}/checkpoints/latest/files/adapter_model.safetensors"
    head = await http.head(path)
    assert int(head.headers["content-length"]) == len(WEIGHTS)
    assert head.content == b""
    got = b""
    for upto in (1000, 300_000, 900_000, None):
        headers = {"range": f"bytes={len(got)}-", "if-range": head.headers["etag"]}
        async with http.stream("GET", path, headers=headers) as response:
            assert response.status_code == 206
            async for chunk in response.aiter_bytes(4096):
                got += chunk
                if upto is not None and len(got) >= upto:
                    break
    assert hashlib.sha256(got).hexdigest() == head.headers["etag"].strip('"')


async def test_ranges_conditions_and_head(http: httpx2.AsyncClient, job: str) -> None:
    path = f"{JOBS}/{job}/checkpoints/latest/files/adapter_model.safetensors"
    whole = await http.get(path)
    head = await http.head(path)
    moving = {"date", "x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in moving} == {
        k: v for k, v in whole.headers.items() if k not in moving
    }
    assert "content-encoding" not in whole.headers
    size = len(WEIGHTS)
    for asked, start, end in (
        ("0-0", 0, 1),
        ("-5", size - 5, size),
        (f"{size - 1}-", size - 1, size),
    ):
        part = await http.get(path, headers={"range": f"bytes={asked}"})
        assert part.status_code == 206
        assert part.content == WEIGHTS[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    beyond = await http.get(path, headers={"range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "range_not_satisfiable")
    changed = await http.get(path, headers={"range": "bytes=0-0", "if-range": '"other"'})
    assert (changed.status_code, len(changed.content)) == (200, size)
    same = await http.get(path, headers={"if-none-match": whole.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")


async def test_archives_hold_the_export_and_are_the_same_each_time(
    http: httpx2.AsyncClient, job: str
) -> None:
    for path in (f"{JOBS}/{job}/checkpoints/best/archive", f"{JOBS}/{job}/adapter"):
        for form, mode in (("tar", "r:"), ("tar.gz", "r:gz")):
            first, second = [await http.get(path, params={"format": form}) for _ in range(2)]
            assert first.content == second.content
            with tarfile.open(fileobj=io.BytesIO(first.content), mode=mode) as archive:  # type: ignore[call-overload]
                found = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
            assert found == PUBLIC
    plain = await http.get(f"{JOBS}/{job}/adapter")
    assert int(plain.headers["content-length"]) == len(plain.content)
    assert (await http.get(f"{JOBS}/{job}/adapter", params={"format": "zip"})).status_code == 400


async def test_there_is_no_adapter_before_the_first_export(
    http: httpx2.AsyncClient, data_file: str, base_model: str
) -> None:
    made = (await http.post(JOBS, json={"model": base_model, "training_file": data_file})).json()
    answer = await http.get(f"{JOBS}/{made['id']}/adapter")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_ready")
    assert answer.headers["x-should-retry"] == "false"


HUB = """
import sys
from huggingface_hub import hf_hub_download, snapshot_download, file_exists, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
repo, cache = sys.argv[1:]
path = hf_hub_download(repo, "adapter_model.safetensors", cache_dir=cache)
print("file", path)
print("folder", snapshot_download(repo, cache_dir=cache))
print("step", snapshot_download(repo, revision="step-2", cache_dir=cache))
print("info", HfApi().model_info(repo).sha, sorted(f.path for f in HfApi().list_repo_tree(repo)))
print("exists", file_exists(repo, "adapter_config.json"), file_exists(repo, "nothing.bin"))
for missing, error in (((repo, "nothing.bin"), EntryNotFoundError),
                       (("acme/none", "x.json"), RepositoryNotFoundError)):
    try:
        hf_hub_download(*missing, cache_dir=cache)
    except error:
        print("refused")
"""


async def test_huggingface_hub_downloads_from_us(
    service: Service, key: str, job: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    environment: dict[str, Any] = {
        **os.environ,
        "HF_ENDPOINT": f"{service.url}/hf",
        "HF_TOKEN": key,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", HUB, f"acme/{job}", str(cache)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in ran.stdout.splitlines() if " " in line)
    for name, content in PUBLIC.items():
        for folder in (lines["folder"], lines["step"]):
            assert await asyncio.to_thread(_read, folder, name) == content
    assert str(sorted(PUBLIC)) in lines["info"]
    assert lines["exists"] == "True False"
    assert ran.stdout.count("refused") == 2


def _read(folder: str, name: str) -> bytes:
    with open(f"{folder}/{name}", "rb") as stream:
        return stream.read()
