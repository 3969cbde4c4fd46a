from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.log import STRUCK
from worker.logs import LogBook


def all_of(book: LogBook) -> str:
    return book.take() + book.finish()


def test_lines_come_out_as_they_went_in() -> None:
    book = LogBook(1000)
    book.feed(b"one\ntw")
    assert book.take() == "one\n"
    assert book.take() == ""
    book.feed(b"o\nthree")
    assert all_of(book) == "two\nthree"


@given(st.lists(st.binary(max_size=200), max_size=30))
def test_within_the_budget_nothing_is_lost(chunks: list[bytes]) -> None:
    book = LogBook(1 << 20)
    seen = ""
    for chunk in chunks:
        book.feed(chunk)
        seen += book.take()
    whole = b"".join(chunks).decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    # Cut between chunks only at line ends: no character is torn apart.
    assert seen + book.finish() == whole


def test_a_flood_keeps_its_head_and_its_tail_and_says_what_is_missing() -> None:
    book = LogBook(10_000)
    total = 0
    for number in range(20_000):
        line = b"line %06d\n" % number
        total += len(line)
        book.feed(line)
    text = all_of(book)
    assert text.startswith("line 000000\n")
    assert text.endswith("line 019999\n")
    assert len(text) < 10_000 + 64 * 1024 + 2 * 8192
    head, _, rest = text.partition("[")
    missing = int(rest.partition(" bytes left out]\n")[0])
    assert len(head) + missing + len(rest.partition("\n")[2]) == total
    assert book.last_lines().endswith("line 019999\n")


def test_a_line_without_end_is_cut_not_hoarded() -> None:
    book = LogBook(100_000)
    for _ in range(5):
        book.feed(b"x" * 5000)
    assert len(book.take()) >= 16_000


@pytest.mark.parametrize(
    "secret",
    [
        b"ft_0123456789ab_0123456789abcdefghijkl",
        b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        b"hf_abcdefghijklmnopqrstuvwxyz",
        b"AKIAIOSFODNN7EXAMPLE",
        b"user:hunter2",
    ],
)
def test_secrets_are_blacked_out_even_across_chunks(secret: bytes) -> None:
    line = b"at postgresql://" + secret + b"@db/x\n" if b":" in secret else b"key " + secret + b"\n"
    book = LogBook(1000)
    for at in range(len(line)):
        book.feed(line[at : at + 1])
    text = book.take()
    assert secret.decode() not in text
    assert STRUCK in text


def test_ordinary_text_is_left_alone() -> None:
    line = "ft_loss 0.1 at https://host:8080/path?x=a@b\n"
    book = LogBook(1000)
    book.feed(line.encode())
    assert book.take() == line
