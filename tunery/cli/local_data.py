"""Data files of this machine, checked and described as the service does at upload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tunery.errors import InvalidData
from tunery.models.store import sha256_of
from tunery.spec import DataFile

if TYPE_CHECKING:
    from tunery.data.validate import Report

Suffix = Literal[".jsonl", ".jsonl.gz", ".csv", ".parquet", ".txt"]
SUFFIXES: tuple[Suffix, ...] = (".jsonl.gz", ".jsonl", ".csv", ".parquet", ".txt")


def suffix_of(path: Path) -> Suffix:
    """The kind of data file, by its name.

    Raises:
        InvalidData: not one that can be read.
    """
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise InvalidData(
        f"{path.name} is no data file",
        code="unsupported_media_type",
        hint=f"known endings: {', '.join(SUFFIXES)}",
    )


def report_of(path: Path) -> Report:
    """What is found in a file.

    Raises:
        InvalidData: there is no such file, or it is of another kind.
    """
    from tunery.data.validate import validate

    if not path.is_file():
        raise InvalidData(f"there is no file {path}", code="file_not_found")
    return validate(path, suffix_of(path))


def held_out_report(path: Path, training: Path, trained: Report) -> Report:
    """What is found in a validation file, rows of the training file among its problems.

    Raises:
        InvalidData: as `report_of`.
    """
    from tunery.data.read import read_rows
    from tunery.data.validate import PROBLEMS_SHOWN, overlap

    report = report_of(path)
    format = report.format
    if trained.valid and report.valid and format is not None and format == trained.format:
        found = overlap(
            read_rows(training, suffix_of(training), format),
            read_rows(path, suffix_of(path), format),
            format,
        )
        report.problems = [*report.problems, *found.problems][:PROBLEMS_SHOWN]
        report.problem_counts |= found.problem_counts
    return report


def describe(path: Path) -> DataFile:
    """The file as a spec names it.

    Raises:
        InvalidData: it cannot be trained on; `problems` says where.
    """
    report = report_of(path)
    if not report.valid or report.format is None:
        raise InvalidData(
            f"{path.name} cannot be trained on: {len(report.problems)} problems",
            problems=[dict(problem) for problem in report.problems],
        )
    return DataFile(
        file_id=path.name,
        sha256=sha256_of(path),
        format=report.format,
        rows=report.rows,
        size_bytes=path.stat().st_size,
        suffix=suffix_of(path),
        labels=tuple(report.labels) if report.labels else None,
    )
