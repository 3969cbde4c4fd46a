"""Benchmarks measure in turns, keep what they measured, and tell it truly."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from bench import harness
from bench.figures import Figure, all_figures

if TYPE_CHECKING:
    from pathlib import Path

RATIO = Figure(
    key="speed",
    what="ours against theirs",
    subject="ours",
    baseline="theirs",
    unit="per second",
    command="python -m bench.speed",
    at_least=2,
)
MEMORY = Figure(
    key="memory",
    what="more memory",
    subject="busy",
    baseline="idle",
    unit="MB",
    command="python -m bench.memory",
    at_most=64,
    kind="difference",
)


def test_sides_are_measured_in_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = harness.interleave({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_ratio_is_taken_round_by_round() -> None:
    # Medians of the sides would give 4 / 2; a slow round slows both sides.
    samples = {"theirs": [1.0, 2.0, 10.0], "ours": [3.0, 4.0, 30.0]}
    result = harness.conclude(RATIO, samples)
    assert result.rounds == [3.0, 2.0, 3.0]
    assert result.median == 3.0


def test_a_difference_is_a_difference() -> None:
    result = harness.conclude(MEMORY, {"idle": [100.0], "busy": [130.0]})
    assert result.rounds == [30.0]


@pytest.mark.parametrize(
    ("figure", "value", "expected"),
    [(RATIO, 2.0, True), (RATIO, 1.99, False), (MEMORY, 64.0, True), (MEMORY, 64.1, False)],
)
def test_a_bound_is_part_of_what_is_allowed(figure: Figure, value: float, expected: bool) -> None:
    assert figure.holds(value) is expected


def test_what_was_kept_is_read_back_whole(tmp_path: Path) -> None:
    result = harness.conclude(RATIO, {"theirs": [1.0], "ours": [3.0]}, clients=16)
    harness.keep(result, tmp_path)
    assert harness.kept(tmp_path) == {"speed": result}
    facts = json.loads((tmp_path / "speed.json").read_text())["machine"]
    assert facts["cores"] >= 1
    assert facts["packages"]["fastapi"]


def test_the_table_tells_a_missed_bound_and_what_was_not_measured(tmp_path: Path) -> None:
    missed = harness.conclude(RATIO, {"theirs": [2.0, 2.0], "ours": [3.0, 2.0]})
    table = harness.table([RATIO, MEMORY], {"speed": missed})
    speed, memory = table.splitlines()[2:]
    assert "| ≥ 2 | 1.25 **missed** | 1 to 1.5, 2 rounds | theirs 2, ours 2.5 per second" in speed
    assert "| ≤ 64 MB | not measured yet |" in memory


def test_rendering_replaces_the_table_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{harness.BEGIN}\nold\n{harness.END}\nafter\n")
    harness.keep(harness.conclude(RATIO, {"theirs": [1.0], "ours": [3.0]}), tmp_path)
    harness.render([RATIO], readme, tmp_path)
    text = readme.read_text()
    assert text.startswith(f"before\n{harness.BEGIN}\n")
    assert text.endswith(f"{harness.END}\nafter\n")
    assert "old" not in text
    assert "`speed`: ours against theirs" in text
    harness.render([RATIO], readme, tmp_path)
    assert readme.read_text() == text


def test_figures_are_found_and_every_command_names_a_module() -> None:
    figures = all_figures()
    assert {"submit-1", "get-job", "upload-memory", "start-warm", "service-speed"} <= {
        f.key for f in figures
    }
    for figure in figures:
        program, flag, module = figure.command.split()[:3]
        assert (program, flag) == ("python", "-m")
        assert (harness.HERE / f"{module.removeprefix('bench.')}.py").is_file(), figure.key
        assert figure.at_least is None or figure.at_most is None, figure.key
    judged = {figure.key for figure in figures if figure.judged}
    # Those without a bound stand beside the same with one.
    unjudged = {figure.key for figure in figures} - judged
    assert {key.removesuffix("-disk") for key in unjudged} <= judged


def test_a_figure_without_a_bound_says_so_and_cannot_miss() -> None:
    bare = dataclasses.replace(RATIO, at_least=None)
    assert (bare.judged, bare.bound, bare.holds(0.0)) == (False, "not judged", True)


def test_the_readme_shows_what_is_kept() -> None:
    text = harness.README.read_text(encoding="utf-8")
    assert harness.table(all_figures(), harness.kept()) in text, "run: python -m bench.harness"
