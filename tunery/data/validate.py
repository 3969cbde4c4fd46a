"""Stage A: what can be said of a data file before any model is known.

`Validator` takes a file of lines as it arrives, `validate` a file that lies there. Both hold one
row, up to 100 problems, and to find duplicates the digests of up to half a million rows (16 MiB).
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import resource
import secrets
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.data import formats, read
from tunery.data.formats import Finding, sorted_labels
from tunery.data.read import LIMITS, BadFile, BadRow, Gunzip, Limits, Lines

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunery.data.formats import Format, Row, Severity

PROBLEMS_SHOWN = 100
PER_CODE_SHOWN = 25
"""So that one flaw of every row does not hide all others."""
FEW_EXAMPLES = 10
LABELS_LIMIT = 10_000
MEMORY_LIMIT_BYTES = 8 << 30
"""Of addresses, of which a decoder reserves more than it touches."""
CPU_LIMIT_S = 1800
OVERLAP = "train_valid_overlap"
LINE_SUFFIXES = frozenset({".jsonl", ".jsonl.gz"})


@dataclasses.dataclass(slots=True)
class Report:
    """What a file holds, and what is wrong with it.

    Attributes:
        format: None when no row has one.
        rows: rows that can be read and are sound.
        problems: at most 100 of `{line, path, code, severity, message}`, in the order of the file;
            line and path are None for what concerns the whole file.
        problem_counts: all of them, by code.
        valid: there is no problem of severity `error`.
        labels: class names in id order; None for formats without classes.
        features: in how many rows something was seen: tools, system, weights, multi_turn.
    """

    format: str | None = None
    rows: int = 0
    problems: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problem_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    valid: bool = True
    labels: list[str] | None = None
    features: dict[str, int] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> Report:
        return Report(**document)


class _Tally:
    """Judges row after row; knows nothing of how they are written."""

    def __init__(self) -> None:
        self.report = Report()
        self._counts: Counter[str] = Counter()
        self._features: Counter[str] = Counter()
        self._labels: set[str] = set()
        self._format: Format | None = None
        self._seen = Digests()
        self._teaching = 0

    def note(
        self,
        line: int | None,
        code: str,
        message: str,
        *,
        path: str | None = None,
        severity: Severity = "error",
    ) -> None:
        self._counts[code] += 1
        if severity == "error":
            self.report.valid = False
        # A note is worth saying once; its count says how often it was so.
        room = 1 if severity == "note" else PER_CODE_SHOWN
        if self._counts[code] <= room and len(self.report.problems) < PROBLEMS_SHOWN:
            self.report.problems.append(
                {"line": line, "path": path, "code": code, "severity": severity, "message": message}
            )

    def take(self, line: int, row: Row | BadRow | None) -> None:
        """What stands at a line; None for a blank one."""
        if row is None:
            self.note(line, "blank_line", "blank lines are skipped", severity="note")
        elif isinstance(row, BadRow):
            self.bad(line, row)
        else:
            self._row(line, row)

    def bad(self, line: int, bad: BadRow) -> None:
        self.note(line, bad.code, bad.message)

    def bom(self) -> None:
        self.note(1, "utf8_bom", "a byte order mark is skipped", severity="note")

    def _row(self, line: int, row: Row) -> None:
        if self._format is None:
            found = formats.detect(row)
            if isinstance(found, Finding):
                self._finding(line, found)
                return
            self._format = found
        broken = empty = False
        for finding in formats.check(row, self._format):
            broken |= finding.severity == "error"
            empty |= finding.code == "no_trainable_tokens"
            self._finding(line, finding)
        if not broken:
            self._sound(line, self._format.normal(row), self._format)
            self._teaching += not empty

    def _finding(self, line: int, finding: Finding) -> None:
        self.note(line, finding.code, finding.message, path=finding.path, severity=finding.severity)

    def _sound(self, line: int, row: Row, form: Format) -> None:
        self.report.rows += 1
        self._features.update(form.features(row))
        before = self._seen.add(digest(row, form), line)
        if before is not None:
            self.note(line, "duplicate_row", f"the same as line {before}", severity="warning")
        if form.labels is not None and len(self._labels) <= LABELS_LIMIT:
            self._labels.update(form.labels(row))
            if len(self._labels) > LABELS_LIMIT:
                self.note(line, "too_many_labels", f"more than {LABELS_LIMIT} different labels")

    def close(self) -> Report:
        """The report, with what only the whole file shows."""
        rows = self.report.rows
        if rows == 0:
            self.note(None, "too_few_examples", "the file has no usable row")
        elif self._teaching == 0:
            self.note(None, "no_trainable_tokens", "no row has anything to learn")
        elif rows < FEW_EXAMPLES:
            self.note(
                None,
                "too_few_examples",
                f"{rows} rows teach little; 50 is a start",
                severity="warning",
            )
        if self._format is not None and self._format.labels is not None:
            self.report.labels = sorted_labels(self._labels)[:LABELS_LIMIT]
        return self.interim(None if self._format is None else self._format.name)

    def interim(self, format: str | None) -> Report:
        """The report so far."""
        self.report.format = format
        self.report.problem_counts = dict(sorted(self._counts.items()))
        self.report.features = dict(sorted(self._features.items()))
        return self.report


class Validator:
    """Validates JSONL, plain or gzipped, in the pieces in which it arrives."""

    def __init__(self, suffix: str, limits: Limits = LIMITS) -> None:
        """Raises: ValueError: files of this suffix are not made of lines; see `validate`."""
        if suffix not in LINE_SUFFIXES:
            raise ValueError(f"{suffix} is validated from a file")
        self._limits = limits
        self._lines = Lines(limits)
        self._gunzip = Gunzip(limits) if suffix == ".jsonl.gz" else None
        self._tally = _Tally()
        self._given_up = False

    def feed(self, data: bytes) -> None:
        """The next piece. After a `BadFile` the rest is ignored."""
        if self._given_up:
            return
        try:
            if self._gunzip is None:
                self._take(self._lines.feed(data))
            else:
                for piece in self._gunzip.feed(data):
                    self._take(self._lines.feed(piece))
        except BadFile as bad:
            self._give_up(bad)

    def finish(self) -> Report:
        """The report on everything that was fed."""
        if not self._given_up:
            try:
                if self._gunzip is not None:
                    self._gunzip.finish()
                self._take(self._lines.finish())
            except BadFile as bad:
                self._give_up(bad)
        if self._lines.had_bom:
            self._tally.bom()
        return self._tally.close()

    def _give_up(self, bad: BadFile) -> None:
        self._given_up = True
        self._tally.bad(bad.line or self._lines.number + 1, bad)

    def _take(self, lines: Iterable[bytes | BadRow]) -> None:
        for line, row in read.numbered(self._lines, lines, self._limits):
            self._tally.take(line, row)


def validate(path: Path, suffix: str, limits: Limits = LIMITS) -> Report:
    """The report on a file.

    Raises:
        InvalidConfig: files of this suffix are not read.
        OSError: the file cannot be opened.
    """
    if suffix in LINE_SUFFIXES:
        validator = Validator(suffix, limits)
        with path.open("rb") as file:
            while piece := file.read(read.CHUNK_BYTES):
                validator.feed(piece)
        return validator.finish()
    tally = _Tally()
    line = 0
    try:
        for line, row in read.raw_rows(path, suffix, limits):
            tally.take(line, row)
    except BadFile as bad:
        tally.bad(bad.line or line + 1, bad)
    if suffix == ".csv" and _begins_with_bom(path):
        tally.bom()
    return tally.close()


def _begins_with_bom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(read.BOM)) == read.BOM


# Sameness


# Rows that all fall into one slot of `Digests` cannot be made without knowing this.
_SALT = secrets.token_bytes(16)


def digest(row: Row, form: Format) -> int:
    """64 bits of what a normal row teaches; never 0, and another number in each process."""
    content = {key: row.get(key) for key in form.content}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=_short)
    short = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, salt=_SALT).digest()
    return int.from_bytes(short) or 1


def _short(value: Any) -> str:
    return hashlib.blake2b(value).hexdigest() if isinstance(value, bytes) else str(value)


class Digests:
    """A map from digests to lines, in 16 bytes a slot. Rows beyond `most` are not remembered."""

    def __init__(self, most: int = 500_000) -> None:
        self._most = most
        self._count = 0
        self._resize(1 << 10)

    def _resize(self, slots: int) -> None:
        self._mask = slots - 1
        self._keys = array.array("Q", bytes(8 * slots))
        self._lines = array.array("Q", bytes(8 * slots))

    def _slot(self, key: int) -> int:
        at = key & self._mask
        while self._keys[at] not in (0, key):
            at = (at + 1) & self._mask
        return at

    def get(self, key: int) -> int | None:
        """The line that was added under this digest."""
        at = self._slot(key)
        return self._lines[at] if self._keys[at] else None

    def add(self, key: int, line: int) -> int | None:
        """The line that was added before; None if this is the first."""
        at = self._slot(key)
        if self._keys[at]:
            return self._lines[at]
        if self._count < self._most:
            self._keys[at], self._lines[at] = key, line
            self._count += 1
            if self._count * 3 > len(self._keys) * 2:
                self._grow()
        return None

    def _grow(self) -> None:
        keys, lines = self._keys, self._lines
        self._resize(len(keys) * 2)
        for key, line in zip(keys, lines, strict=True):
            if key:
                at = self._slot(key)
                self._keys[at], self._lines[at] = key, line


def overlap(
    training: Iterable[tuple[int, Row]], validation: Iterable[tuple[int, Row]], format: str
) -> Report:
    """Which validation rows are trained on: they measure memory, not learning.

    Takes (line, normal row), as `read.read_rows` yields them. Each problem is a warning, `OVERLAP`,
    at a line of the validation file. Exact for up to half a million training rows.
    """
    form = formats.find(format)
    trained = Digests()
    for line, row in training:
        trained.add(digest(row, form), line)
    tally = _Tally()
    for line, row in validation:
        twin = trained.get(digest(row, form))
        if twin is not None:
            tally.note(
                line,
                OVERLAP,
                f"the same as line {twin} of the training file",
                severity="warning",
            )
    return tally.interim(format)


def main(arguments: list[str]) -> int:
    """`python -m tunery.data.validate FILE SUFFIX`: the report as JSON on standard output.

    A process of its own, so that a file which makes a decoder crash, swell or spin takes nothing
    else down.
    """
    path, suffix = arguments
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    json.dump(validate(Path(path), suffix).as_json(), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
