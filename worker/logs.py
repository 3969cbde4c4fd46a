"""A trainer's output: redacted, and bounded however much is printed."""

from __future__ import annotations

from collections import deque

from core.log import redact

_TAIL_BYTES = 64 * 1024
_LINE_BYTES = 8 * 1024


class LogBook:
    """Takes bytes as they come, gives text to store.

    The first `budget_bytes` are stored as they come; of what follows only the last 64 KiB are
    kept, and given at the end behind a line that says how much is missing. Lines stay whole, so
    that a secret cannot hide across two chunks; what has no line end for 8 KiB is cut.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._left = budget_bytes
        self._partial = b""
        self._ready: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._dropped_bytes = 0
        self._recent: deque[bytes] = deque(maxlen=30)

    def feed(self, data: bytes) -> None:
        """Take what the trainer printed."""
        data = self._partial + data
        cut = data.rfind(b"\n") + 1
        if not cut and len(data) >= _LINE_BYTES:
            cut = len(data)
        self._partial = data[cut:]
        if cut:
            self._keep(data[:cut])

    def _keep(self, lines: bytes) -> None:
        fits = len(lines) if len(lines) <= self._left else lines.rfind(b"\n", 0, self._left) + 1
        if fits:
            self._left -= fits
            self._ready.append(lines[:fits])
            self._recent.extend(lines[:fits].splitlines(keepends=True)[-30:])
        if fits == len(lines):
            return
        self._left = 0  # from here on only the tail: the record has one gap, not many
        lines = lines[fits:]
        self._tail.append(lines)
        self._tail_bytes += len(lines)
        while self._tail_bytes - len(self._tail[0]) >= _TAIL_BYTES:
            gone = len(self._tail.popleft())
            self._tail_bytes -= gone
            self._dropped_bytes += gone

    def take(self) -> str:
        """What has become ready since the last call; empty when nothing has."""
        ready, self._ready = b"".join(self._ready), []
        return _text(ready)

    def give_back(self, text: str) -> None:
        """It could not be stored: it comes first the next time."""
        if text:
            self._ready.insert(0, text.encode())

    def finish(self) -> str:
        """The last of it. Nothing may be fed afterwards."""
        if self._partial:
            partial, self._partial = self._partial, b""
            self._keep(partial)
        tail = b"".join(self._tail)
        over = max(0, len(tail) - _TAIL_BYTES)
        cut = tail.find(b"\n", over) + 1 if over else 0
        tail = tail[cut:]
        dropped = self._dropped_bytes + cut
        self._tail.clear()
        self._recent.extend(tail.splitlines(keepends=True)[-30:])
        gap = f"[{dropped} bytes left out]\n" if dropped else ""
        return self.take() + gap + _text(tail)

    def last_lines(self) -> str:
        """The last thirty lines, for an error's sake; complete after `finish`."""
        return _text(b"".join(self._recent))[-4000:]


def _text(data: bytes) -> str:
    # Postgres stores every character but NUL.
    text = data.decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return redact(text)
