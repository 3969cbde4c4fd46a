"""HTTP load over kept connections: bytes out, bytes in.

A client library would cost more CPU than the server that it is to measure, on the same cores; so
requests are made once, as bytes, and of an answer only the status and the length are read.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Address:
    host: str
    port: int


def request(method: str, path: str, key: str | None = None, body: Any = None) -> bytes:
    """A request, ready to be sent any number of times."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: bench", f"content-length: {len(content)}"]
    if body is not None:
        lines.append("content-type: application/json")
    if key is not None:
        lines.append(f"authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode() + content


async def rate(address: Address, message: bytes, *, clients: int, seconds: float) -> float:
    """Answers per second to `clients` that each ask again as soon as they are answered.

    Raises:
        RuntimeError: an answer other than 200.
    """
    connections = [
        await asyncio.open_connection(address.host, address.port) for _ in range(clients)
    ]
    began = time.perf_counter()
    until = began + seconds
    counts = await asyncio.gather(*(_ask_until(until, message, *each) for each in connections))
    took_s = time.perf_counter() - began
    for _, writer in connections:
        writer.close()
    return sum(counts) / took_s


async def _ask_until(
    until: float, message: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> int:
    count = 0
    while time.perf_counter() < until:
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_length(head))
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{head.splitlines()[0]!r}: {body[:300]!r}")
        count += 1
    return count


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise RuntimeError(f"no content-length in {head!r}")
