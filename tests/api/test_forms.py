"""The streaming form parser, fed in pieces of every size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.forms import Form, nested
from tests.api.test_files import form
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CONTENT = b"one\r\n--front\r\n\r\n--frontie\r\n-\r-\n" * 3  # almost the boundary, many times


class Sent:
    """A request whose body arrives in pieces."""

    def __init__(self, body: dict[str, Any], step: int) -> None:
        self.headers = body["headers"]
        self._body, self._step = body["content"], step

    async def stream(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), self._step):
            yield self._body[start : start + self._step]
        yield b""


async def read(body: dict[str, Any], step: int) -> tuple[str, bytes, dict[str, str]]:
    made = Form(Sent(body, step))  # type: ignore[arg-type]
    filename = await made.file("file")
    content = b"".join([chunk async for chunk in made.chunks()])
    return filename, content, await made.rest()


BODY = form(
    ("purpose", None, b"fine-tune"),
    ("file", "t.jsonl", CONTENT),
    ("expires_after[anchor]", None, b"created_at"),
    ("empty", None, b""),
)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10_000])
async def test_pieces_of_any_size_are_one_form(step: int) -> None:
    filename, content, fields = await read(BODY, step)
    assert filename == "t.jsonl"
    assert content == CONTENT
    assert fields == {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "empty": ""}
    assert nested(fields, "expires_after") == {"anchor": "created_at"}


@pytest.mark.parametrize("cut", range(1, len(BODY["content"]), 13))
async def test_a_form_cut_anywhere_is_refused(cut: int) -> None:
    body = {**BODY, "content": BODY["content"][:cut]}
    with pytest.raises(InvalidConfig) as caught:
        await read(body, 16)
    assert caught.value.code == "invalid_multipart"


@given(st.binary(max_size=200), st.integers(1, 50))
async def test_no_body_crashes_it(content: bytes, step: int) -> None:
    try:
        await read({**BODY, "content": b"--frontier\r\n" + content}, step)
    except InvalidConfig:
        return
    raise AssertionError("no such body holds a whole form")


async def test_headers_of_a_part_are_bounded() -> None:
    with pytest.raises(InvalidConfig) as caught:
        await read(form(("file", "x" * 10_000, b"")), 1000)
    assert caught.value.code == "invalid_multipart"
