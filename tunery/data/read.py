"""Rows out of JSONL, gzipped JSONL, CSV and Parquet, one at a time, each with its line.

Files come from strangers: nothing here holds more of one than a row of `Limits.row_bytes` (a
batch of rows of a Parquet file), whatever it claims to be. What is wrong with a row is a `BadRow`;
what makes the rest of the file unreadable is a `BadFile`. No message quotes the file.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from tunery.data import formats
from tunery.data.formats import Finding, Format
from tunery.errors import InvalidConfig, InvalidData

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from tunery.data.formats import Row

SUFFIXES = (".jsonl.gz", ".jsonl", ".csv", ".parquet")
CHUNK_BYTES = 1 << 18
BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a file is believed."""

    row_bytes: int = 1 << 20
    """About 250,000 tokens of English."""
    media_bytes: int = 32 << 20
    """Of sounds and pictures in a row, beside its text."""
    depth: int = 64
    """Of nested objects and lists in a row."""
    integer_digits: int = 100
    lines: int = 100_000_000
    unpacked_bytes: int = 64 << 30
    ratio: int = 100
    """Of unpacked to packed bytes, once more than `ratio_grace_bytes` came out."""
    ratio_grace_bytes: int = 8 << 20
    group_bytes: int = 1 << 30
    """Unpacked size of a Parquet row group."""


LIMITS = Limits()


class BadRow(Exception):
    """This row cannot be read; the next one may."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


class BadFile(BadRow):
    """Nothing after this can be read. `line` is None where it is the one after the last."""

    def __init__(self, code: str, message: str, line: int | None = None) -> None:
        super().__init__(code, message)
        self.args = (code, message, line)
        self.line = line


def suffix_of(filename: str) -> str | None:
    """The suffix that says how to read a file of this name; None when nothing here reads it."""
    name = filename.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


# JSON


def parse(line: bytes, limits: Limits = LIMITS) -> Row:
    """The object that a line of JSON is.

    Raises:
        BadRow: it is none (`not_utf8`, `bad_json`, `not_object`, `wrong_type`).
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"byte {error.start + 1} of the line is not UTF-8") from None
    if line.count(b"{") + line.count(b"[") > limits.depth and _depth(line) > limits.depth:
        raise BadRow("bad_json", f"nested more than {limits.depth} deep")
    try:
        row = _decoder(limits).decode(text)
    except json.JSONDecodeError as error:
        raise BadRow("bad_json", _syntax(error, line)) from None
    except RecursionError:
        raise BadRow("bad_json", f"nested more than {limits.depth} deep") from None
    if not isinstance(row, dict):
        raise BadRow("not_object", "a row must be a JSON object")
    if b"\\u" in line:  # only an escape can spell what UTF-8 cannot
        check_text(row)
    return row


def check_text(row: Row) -> int:
    """Bytes of the row as JSON, about, if all its strings can be stored and trained on.

    Raises:
        BadRow: half a surrogate pair (`not_utf8`), or a NUL (`wrong_type`).
    """
    flat = json.dumps(row, ensure_ascii=False, default=lambda v: "" if _raw(v) else str(v))
    try:
        size = len(flat.encode())
    except UnicodeEncodeError:
        raise BadRow("not_utf8", "half of a surrogate pair stands alone") from None
    if "\\u0000" in flat and any("\0" in text for text in _strings(row)):
        raise BadRow("wrong_type", "a string holds the NUL character")
    return size


def _raw(value: Any) -> bool:
    return isinstance(value, bytes)


def _media_bytes(value: Any) -> int:
    """Bytes in a value that are no text."""
    if isinstance(value, dict):
        return sum(map(_media_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(_media_bytes, value))
    return len(value) if _raw(value) else 0


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _strings(key)
            yield from _strings(below)
    elif isinstance(value, list):
        for below in value:
            yield from _strings(below)


_decoders: dict[Limits, json.JSONDecoder] = {}


def _decoder(limits: Limits) -> json.JSONDecoder:
    if limits not in _decoders:
        _decoders[limits] = json.JSONDecoder(
            parse_int=_integer(limits.integer_digits),
            parse_float=_number,
            parse_constant=_constant,
        )
    return _decoders[limits]


def _integer(digits: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if len(text) > digits:
            raise BadRow("bad_json", f"an integer of more than {digits} digits")
        return int(text)

    return parsed


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise BadRow("bad_json", "a number that is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise BadRow("bad_json", "NaN and Infinity are not JSON")


_QUIET = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[][{}]")


def _depth(line: bytes) -> int:
    """How deep the brackets outside strings nest."""
    deepest = depth = 0
    for bracket in _BRACKETS.findall(_QUIET.sub(b"", line)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


# Of the json module's texts, those that quote nothing of the document.
_SAYS = {
    "Expecting value": "a value is expected",
    "Expecting ',' delimiter": "a comma is expected",
    "Expecting ':' delimiter": "a colon is expected",
    "Expecting property name enclosed in double quotes": "a key in double quotes is expected",
    "Unterminated string starting at": "a string does not end",
    "Extra data": "there is more after the object",
    "Invalid control character at": "a control character must be escaped",
}


def _syntax(error: json.JSONDecodeError, line: bytes) -> str:
    if line.strip() == b"[":
        return "the file is one JSON array; write one object a line instead"
    if line.strip() == b"{":
        return "the object goes on over several lines; write one object a line instead"
    return f"not JSON at column {error.colno}: {_SAYS.get(error.msg, 'a syntax error')}"


# Lines


class Lines:
    """Cuts a stream into lines without ever holding more than one.

    Attributes:
        number: of the last line that was handed out, from 1.
        had_bom: the stream began with a byte order mark, which is left out.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._begun = b""
        self._over = False  # the line that began is too long: the rest of it is dropped
        self.number = 0
        self.had_bom = False

    def feed(self, data: bytes) -> Iterator[bytes | BadRow]:
        """The lines that end in `data`, without their line ends.

        Raises:
            BadFile: more lines than are believed.
        """
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            yield self._line(data[start:end])
            start = end + 1
        self._keep(data[start:])

    def finish(self) -> Iterator[bytes | BadRow]:
        """The last line, if no line end follows it."""
        if self._begun or self._over:
            yield self._line(b"")

    def _line(self, piece: bytes) -> bytes | BadRow:
        self._keep(piece)
        line, over = self._begun, self._over
        self._begun, self._over = b"", False
        self.number += 1
        if self.number > self._limits.lines:
            raise BadFile("too_long", f"more than {self._limits.lines} lines", self.number)
        if over:
            return BadRow("too_long", f"a row of more than {self._limits.row_bytes} bytes")
        if self.number == 1 and line.startswith(BOM):
            self.had_bom = True
            line = line[len(BOM) :]
        return line.removesuffix(b"\r")

    def _keep(self, piece: bytes) -> None:
        if self._over:
            return
        if len(self._begun) + len(piece) > self._limits.row_bytes:
            self._begun, self._over = b"", True
        elif piece:
            self._begun = self._begun + piece if self._begun else piece


class Gunzip:
    """Unpacks a stream in pieces of at most 256 KiB, and stops at what can only be a bomb."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._member = zlib.decompressobj(wbits=31)
        self._packed = self._unpacked = 0
        self._ended = False  # a whole member came, and nothing but padding since

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` unpacks to.

        Raises:
            BadFile: not gzip, or more comes out of it than is believed (`bad_compression`).
        """
        self._packed += len(data)
        while data:
            if self._ended:
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._member, self._ended = zlib.decompressobj(wbits=31), False
            try:
                piece = self._member.decompress(data, CHUNK_BYTES)
            except zlib.error:
                raise BadFile("bad_compression", "this is not gzip data, or is damaged") from None
            data = self._member.unconsumed_tail
            if self._member.eof:
                self._ended, data = True, self._member.unused_data
            self._weigh(len(piece))
            if piece:
                yield piece

    def finish(self) -> None:
        """Raises: BadFile: the stream ends in the middle."""
        if not self._ended:
            raise BadFile("bad_compression", "the gzip data ends too early")

    def _weigh(self, size: int) -> None:
        self._unpacked += size
        if self._unpacked > self._limits.unpacked_bytes:
            raise BadFile(
                "bad_compression", f"unpacks to more than {self._limits.unpacked_bytes} bytes"
            )
        believed = max(self._limits.ratio_grace_bytes, self._packed * self._limits.ratio)
        if self._unpacked > believed:
            raise BadFile("bad_compression", f"unpacks to more than {self._limits.ratio} times")


def row_of(line: bytes, number: int, limits: Limits) -> Row | None:
    """The row of a line of JSONL; None for a blank one.

    Raises:
        BadRow: see `parse`.
        BadFile: the first line shows another kind of file.
    """
    if number == 1:
        if line.startswith(GZIP_MAGIC):
            raise BadFile("bad_json", "this is gzip data; name the file .jsonl.gz", 1)
        if line.startswith(PARQUET_MAGIC):
            raise BadFile("bad_json", "this is a Parquet file; name it .parquet", 1)
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise BadFile("not_utf8", "this is UTF-16; save the file as UTF-8", 1)
    if not line or line.isspace():
        return None
    return parse(line, limits)


# CSV


class _Records:
    """The lines of a CSV file, bounded, with the place where the current record began."""

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._record_bytes = 0
        self.number = 0
        self.start = 0

    def __iter__(self) -> _Records:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._limits.row_bytes + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.start = self.start or self.number
        self._record_bytes += len(line)
        if self._record_bytes > self._limits.row_bytes:
            raise BadFile(
                "too_long", f"a row of more than {self._limits.row_bytes} bytes", self.start
            )
        if self.number == 1:
            line = line.removeprefix(BOM)
        # A byte that is not UTF-8 becomes half a surrogate pair, which `check_text` finds.
        return line.decode(errors="surrogateescape")

    def next_record(self) -> None:
        self.start = self._record_bytes = 0


def _csv_rows(file: BinaryIO, limits: Limits) -> Iterator[tuple[int, Row | BadRow]]:
    # Process-wide, and the only way to allow cells of more than 128 KiB; records are bounded above.
    csv.field_size_limit(max(csv.field_size_limit(), limits.row_bytes))
    records = _Records(file, limits)
    reader = csv.reader(records, strict=True)
    header: list[str] | None = None
    while True:
        records.next_record()
        try:
            cells = next(reader, None)
        except csv.Error:
            raise BadFile(
                "bad_csv", "a quoted cell is damaged or does not end", records.start
            ) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells)
            continue
        yield records.start, _csv_row(header, cells, limits)


def _header(cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(set(header)) != len(header):
        raise BadFile("bad_csv", "two columns have the same name", 1)
    return header


def _csv_row(header: list[str], cells: list[str], limits: Limits) -> Row | BadRow:
    if len(cells) != len(header):
        return BadRow("bad_csv", f"{len(cells)} cells, and the header has {len(header)}")
    try:
        row = {name: _cell(name, cell, limits) for name, cell in zip(header, cells, strict=True)}
        check_text(row)
    except BadRow as bad:
        return bad
    return row


def _cell(name: str, cell: str, limits: Limits) -> Any:
    """A cell's value: what a format says is JSON, such as conversations; else text."""
    if name not in formats.json_columns():
        return cell
    if not cell:
        return None
    if cell[0] not in "[{":
        return cell
    wrapped = b'{"cell":' + cell.encode(errors="surrogatepass") + b"}"
    return parse(wrapped, limits)["cell"]


# Parquet


def _parquet_rows(file: BinaryIO, limits: Limits) -> Iterator[tuple[int, Row | BadRow]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, memory_map=False, pre_buffer=False)
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        if any(group.total_byte_size > limits.group_bytes for group in groups):
            raise BadFile(
                "bad_parquet", f"a row group unpacks to more than {limits.group_bytes} bytes"
            )
        for batch in table.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield number, _parquet_row(row, limits)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError):
        raise BadFile("bad_parquet", "the Parquet file is damaged or ends too early") from None


def _parquet_row(row: Row, limits: Limits) -> Row | BadRow:
    row = _without_nulls(row)
    try:
        size = check_text(row)
    except BadRow as bad:
        return bad
    if size > limits.row_bytes:
        return BadRow("too_long", f"a row of more than {limits.row_bytes} bytes")
    if _media_bytes(row) > limits.media_bytes:
        return BadRow("too_long", f"sounds or pictures of more than {limits.media_bytes} bytes")
    return row


def _without_nulls(value: Any) -> Any:
    """A column of structs gives every row every field: those without a value are not meant."""
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    if isinstance(value, list):
        return [_without_nulls(below) for below in value]
    return value


# Whole files


def raw_rows(
    path: Path, suffix: str, limits: Limits = LIMITS
) -> Iterator[tuple[int, Row | BadRow | None]]:
    """(line, row) of a file; a row that cannot be read is a `BadRow`, a blank line None.

    Lines count from 1: physical ones of text files (where a CSV record begins), rows of Parquet.

    Raises:
        BadFile: the rest of the file cannot be read; the line is the one after the last.
        InvalidConfig: no such suffix.
        OSError: the file cannot be opened.
    """
    if suffix not in SUFFIXES:
        raise InvalidConfig(
            f"files named {suffix} are not read", hint=f"known: {', '.join(SUFFIXES)}"
        )
    with path.open("rb") as file:
        if suffix == ".csv":
            yield from _csv_rows(file, limits)
        elif suffix == ".parquet":
            yield from _parquet_rows(file, limits)
        else:
            yield from _json_rows(file, suffix == ".jsonl.gz", limits)


def _json_rows(
    file: BinaryIO, packed: bool, limits: Limits
) -> Iterator[tuple[int, Row | BadRow | None]]:
    lines = Lines(limits)
    for piece in _unpacked(file, limits) if packed else _pieces(file):
        yield from numbered(lines, lines.feed(piece), limits)
    yield from numbered(lines, lines.finish(), limits)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(CHUNK_BYTES):
        yield piece


def _unpacked(file: BinaryIO, limits: Limits) -> Iterator[bytes]:
    gunzip = Gunzip(limits)
    for piece in _pieces(file):
        yield from gunzip.feed(piece)
    gunzip.finish()


def numbered(
    lines: Lines, found: Iterable[bytes | BadRow], limits: Limits
) -> Iterator[tuple[int, Row | BadRow | None]]:
    """(line, row) of what `lines` hands out; see `raw_rows`.

    Raises:
        BadFile: see `row_of`.
    """
    for line in found:
        if isinstance(line, BadRow):
            yield lines.number, line
            continue
        try:
            yield lines.number, row_of(line, lines.number, limits)
        except BadFile:
            raise
        except BadRow as bad:
            yield lines.number, bad


def read_rows(
    path: Path, suffix: str, format: str | None = None, limits: Limits = LIMITS
) -> Iterator[tuple[int, Row]]:
    """(line, row in its normal form) of a sound file, in order, holding one row at a time.

    Args:
        format: as `tunery.data.formats` names it; None: the first row decides.

    Raises:
        InvalidData: a row is not sound; `problems[0]` has its line, code and path.
        OSError: the file cannot be opened.
    """
    expected = None if format is None else formats.find(format)
    line = 0
    try:
        for line, row in raw_rows(path, suffix, limits):
            if row is None:
                continue
            if isinstance(row, BadRow):
                raise row
            if expected is None:
                expected = _detected(row, line)
            for finding in formats.check(row, expected):
                if finding.severity == "error":
                    raise _invalid(line, finding)
            yield line, expected.normal(row)
    except BadRow as bad:
        at = (bad.line or line + 1) if isinstance(bad, BadFile) else line
        raise _invalid(at, Finding(bad.code, bad.message)) from None


def _detected(row: Row, line: int) -> Format:
    found = formats.detect(row)
    if isinstance(found, Finding):
        raise _invalid(line, found)
    return found


def _invalid(line: int, finding: Finding) -> InvalidData:
    problem = {
        "line": line,
        "path": finding.path,
        "code": finding.code,
        "severity": finding.severity,
        "message": finding.message,
    }
    return InvalidData(f"line {line}: {finding.message}", problems=[problem])
