"""Multipart forms as a stream: the one file of the form is handed on as it arrives.

Starlette's own form parser writes a file to disk before the route sees it; a data file of
gigabytes is to pass through once, straight to the store.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from tunery.errors import InvalidConfig, UnsupportedMediaType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import Request

FIELD_LIMIT_BYTES = 1 << 16
HEADERS_LIMIT_BYTES = 1 << 13
PARTS_LIMIT = 100
DRAIN_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Begin:
    name: str
    filename: str | None


class _End:
    """Of a part."""


class Form:
    """A form with one file: `file`, then `chunks` to their end, then `rest`.

    Attributes:
        fields: what arrived so far of what is not the file.
    """

    def __init__(self, request: Request) -> None:
        """Raises: UnsupportedMediaType: the body is no form, or is compressed."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise UnsupportedMediaType("the body must be multipart/form-data")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise UnsupportedMediaType(
                "a compressed body is not accepted", hint="upload data files as .jsonl.gz instead"
            )
        self.fields: dict[str, str] = {}
        self._stream = request.stream()
        self._events: deque[_Begin | bytes | _End] = deque()
        self._parts = self._header_bytes = 0
        self._field = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._ended = False
        self._parser = MultipartParser(boundary, self._callbacks())

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._on_part,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header,
            "on_headers_finished": self._on_headers,
            "on_part_data": lambda data, start, end: self._events.append(data[start:end]),
            "on_part_end": lambda: self._events.append(_End()),
            "on_end": self._on_end,
        }

    def _on_part(self) -> None:
        self._parts += 1
        self._headers, self._header_bytes = {}, 0
        if self._parts > PARTS_LIMIT:
            raise _broken(f"more than {PARTS_LIMIT} parts")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += self._header(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._header(data[start:end])

    def _header(self, piece: bytes) -> bytes:
        self._header_bytes += len(piece)
        if self._header_bytes > HEADERS_LIMIT_BYTES:
            raise _broken("the headers of a part are too long")
        return piece

    def _on_header(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        filename = options.get(b"filename")
        self._events.append(
            _Begin(
                options.get(b"name", b"").decode(errors="replace"),
                None if filename is None else filename.decode(errors="replace"),
            )
        )

    def _on_end(self) -> None:
        self._ended = True

    async def file(self, name: str) -> str:
        """Read up to the file of that name; returns its filename.

        Raises:
            InvalidConfig: the form has no such file, or is damaged.
        """
        while (event := await self._next()) is not None:
            assert isinstance(event, _Begin), "parts are read to their end"
            if event.name == name:
                return event.filename or ""
            await self._read_field(event)
        raise InvalidConfig(f"{name}: a file is required", code="missing_parameter", param=name)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of the file.

        Raises:
            InvalidConfig: the form is damaged, or ends in the middle.
        """
        while not isinstance(event := await self._next(), _End):
            assert isinstance(event, bytes)
            yield event

    async def rest(self) -> dict[str, str]:
        """Read what follows the file; returns all fields."""
        while (event := await self._next()) is not None:
            assert isinstance(event, _Begin), "parts are read to their end"
            await self._read_field(event)
        return self.fields

    async def drain(self) -> None:
        """Read on for a while: a client that is answered while it still sends may only see a
        broken connection."""
        left = DRAIN_BYTES
        with contextlib.suppress(ClientDisconnect, RuntimeError):
            async for data in self._stream:
                left -= len(data)
                if left < 0:
                    return

    async def _read_field(self, begin: _Begin) -> None:
        if begin.filename is not None:
            raise InvalidConfig("the form has one file too many", param=begin.name)
        value = bytearray()
        while not isinstance(event := await self._next(), _End):
            assert isinstance(event, bytes)
            value += event
            if len(value) > FIELD_LIMIT_BYTES:
                raise _broken("a field is too long")
        self.fields[begin.name] = value.decode(errors="replace")

    async def _next(self) -> _Begin | bytes | _End | None:
        """The next event; None at the end of the form."""
        while not self._events:
            try:
                data = await anext(self._stream, None)
            except ClientDisconnect:
                raise _broken("the body ended too early") from None
            if data is None:
                if not self._ended:
                    raise _broken("the body ended too early")
                return None
            try:
                self._parser.write(data)
            except MultipartParseError:
                raise _broken("a part does not begin or end as it should") from None
        return self._events.popleft()


def _broken(how: str) -> InvalidConfig:
    return InvalidConfig(f"the form is damaged: {how}", code="invalid_multipart")


def nested(fields: dict[str, str], name: str) -> dict[str, str]:
    """`name[key]` fields as a mapping of their keys, as the stock client sends objects."""
    prefix = f"{name}["
    return {
        key.removeprefix(prefix).removesuffix("]"): value
        for key, value in fields.items()
        if key.startswith(prefix) and key.endswith("]")
    }
