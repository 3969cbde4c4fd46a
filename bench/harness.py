"""Measuring in turns, keeping what was measured, and printing it as a table.

Machines differ and are shared, so every figure compares two sides within one run, A B A B, and is
the median over rounds. What is kept names the machine, the commit and every sample.

    python -m bench.harness        write the table of kept results into bench/README.md
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.figures import all_figures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.figures import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
PACKAGES = ("tunery", "torch", "transformers", "peft", "trl", "fastapi", "sqlalchemy", "psycopg")


@dataclass(frozen=True)
class Result:
    """A figure as it was measured: samples by side, one figure for each round, in order."""

    figure: str
    samples: dict[str, list[float]]
    rounds: list[float]
    measured_at: str
    commit: str
    machine: dict[str, Any]
    notes: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"median": self.median}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        fields = json.loads(text)
        fields.pop("median")
        return cls(**fields)


def interleave(
    sides: Mapping[str, Callable[[], float]],
    *,
    rounds: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """Measure each side once per round, in the order given, after a round that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            value = side()
            say(f"{'warm-up' if number == 0 else f'round {number}'}  {name:<12} {value:.4g}")
            if number > 0:
                samples[name].append(value)
    return samples


def conclude(figure: Figure, samples: Mapping[str, Sequence[float]], **notes: object) -> Result:
    """A figure's result from the samples of its two sides, taken in turns."""
    pairs = zip(samples[figure.subject], samples[figure.baseline], strict=True)
    kept = {name: list(samples[name]) for name in (figure.baseline, figure.subject)}
    return Result(
        figure=figure.key,
        samples=kept,
        rounds=[figure.combine(subject, baseline) for subject, baseline in pairs],
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(),
        notes=dict(notes),
    )


def keep(result: Result, folder: Path = RESULTS) -> Path:
    """Write a result where the table is made from; the newest of a figure counts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.figure}.json"
    path.write_text(result.as_json(), encoding="utf-8")
    return path


def kept(folder: Path = RESULTS) -> dict[str, Result]:
    """All kept results by figure."""
    found = (Result.from_json(path.read_text("utf-8")) for path in sorted(folder.glob("*.json")))
    return {result.figure: result for result in found}


def commit() -> str:
    """The checkout's commit, with `+` where files that git knows are changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """What a reader must know to make sense of a figure."""
    load, _, _ = os.getloadavg()
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(load, 1),
        "packages": dict(_versions()),
    }


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def table(figures: Sequence[Figure], results: Mapping[str, Result]) -> str:
    """Every figure with its bound, and what was measured; Markdown."""
    lines = [
        "| figure | bound | measured | range | sides, medians | command |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(figure, results.get(figure.key)) for figure in figures]
    return "\n".join(lines) + "\n"


def _row(figure: Figure, result: Result | None) -> str:
    cells = [f"`{figure.key}`: {figure.what}", figure.bound]
    if result is None:
        cells += ["not measured yet", "", ""]
    else:
        missed = "" if figure.holds(result.median) else " **missed**"
        sides = (f"{name} {statistics.median(v):.4g}" for name, v in result.samples.items())
        cells += [
            f"{result.median:.3g}{missed}",
            f"{min(result.rounds):.3g} to {max(result.rounds):.3g}, {len(result.rounds)} rounds",
            f"{', '.join(sides)} {figure.unit}",
        ]
    return "| " + " | ".join([*cells, f"`{figure.command}`"]) + " |"


def machines(results: Mapping[str, Result]) -> str:
    """The machines behind the results, one line each."""
    found: dict[str, list[Result]] = {}
    for result in results.values():
        facts = result.machine
        line = (
            f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
            f"{facts['system']}, Python {facts['python']}"
        )
        found.setdefault(line, []).append(result)
    return "".join(
        f"- {line}: {', '.join(f'`{result.figure}`' for result in group)}; load "
        f"{min(result.machine['load'] for result in group)} to "
        f"{max(result.machine['load'] for result in group)} when they were taken\n"
        for line, group in found.items()
    )


def render(figures: Sequence[Figure], readme: Path = README, folder: Path = RESULTS) -> None:
    """Replace what stands between the marks of the README."""
    results = kept(folder)
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    told = f"{BEGIN}\n{table(figures, results)}\n{machines(results)}{END}"
    readme.write_text(before + told + after, encoding="utf-8")


def tell(line: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(line + "\n")


def finish(*results: Result) -> None:
    """Keep results, bring the README up to date, and say how they came out."""
    by_key = {figure.key: figure for figure in all_figures()}
    for result in results:
        keep(result)
        figure = by_key[result.figure]
        verdict = "holds" if figure.holds(result.median) else "MISSED"
        told = f"{result.figure}: {result.median:.3g} ({figure.bound})"
        tell(f"{told} {verdict}" if figure.judged else told)
    render(list(by_key.values()))


if __name__ == "__main__":
    render(all_figures())
