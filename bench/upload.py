"""How much more memory the API process needs while a 1 GB file is uploaded and validated.

Both numbers are the kernel's: resident size before, and the highest since the counter was reset.

    python -m bench.upload [rounds]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench import harness, tiny
from bench.figures import Figure
from bench.service import ServiceUnderTest

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE_BYTES = 10**9
BLOCK_ROWS = 1000
BOUNDARY = b"bench-boundary"
FIGURES = [
    Figure(
        key="upload-memory",
        what="peak memory of the API process while a 1 GB file is uploaded and validated, "
        "over what it had before",
        subject="uploading",
        baseline="idle",
        unit="MB",
        command="python -m bench.upload",
        at_most=64,
        kind="difference",
    )
]


def memory_mb(pid: int, field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest since the last reset) of a process, in megabytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} of process {pid}")


def forget_peak(pid: int) -> None:
    """Let the kernel count the highest resident size from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def form(size_bytes: int) -> tuple[Iterator[bytes], int]:
    """A multipart form with a file of chat rows of about that size, and the form's exact size."""
    block = tiny.jsonl(tiny.chats(BLOCK_ROWS, turns=8))
    count = max(1, size_bytes // len(block))
    head = (
        b'--%b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--%b\r\ncontent-disposition: form-data; name="file"; filename="big.jsonl"\r\n'
        b"content-type: application/jsonl\r\n\r\n"
    ) % (BOUNDARY, BOUNDARY)
    tail = b"\r\n--%b--\r\n" % BOUNDARY

    def parts() -> Iterator[bytes]:
        yield head
        for _ in range(count):
            yield block
        yield tail

    return parts(), len(head) + count * len(block) + len(tail)


def upload(service: ServiceUnderTest, size_bytes: int) -> None:
    """Upload a large file, see that every row was looked at, and delete it."""
    content, length = form(size_bytes)
    headers = {
        "content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}",
        "content-length": str(length),
    }
    with service.client() as client:
        answer = client.post("/v1/files", content=content, headers=headers)
        file = answer.json()
        while file.get("status") == "uploaded":
            file = client.get(f"/v1/files/{file['id']}").json()
        if file.get("status") != "processed":
            raise RuntimeError(f"{answer.status_code}: {file}")
        client.delete(f"/v1/files/{file['id']}")


def main(rounds: int) -> None:
    with ServiceUnderTest(worker=False) as service:
        assert service.api.process is not None
        pid = service.api.process.pid

        def idle() -> float:
            forget_peak(pid)
            return memory_mb(pid, "VmRSS")

        def uploading() -> float:
            upload(service, SIZE_BYTES)
            return memory_mb(pid, "VmHWM")

        upload(service, 10**6)  # what every process pays once: imports, pools, code paths
        samples = {"idle": [idle()], "uploading": [uploading()]}
        for _ in range(rounds - 1):
            samples["idle"].append(idle())
            samples["uploading"].append(uploading())
        harness.tell(str(samples))
    harness.finish(*(harness.conclude(f, samples, size_bytes=SIZE_BYTES) for f in FIGURES))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
