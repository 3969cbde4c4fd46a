"""What the pages tell a reader to type can be typed, and what they point to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from tunery.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench" / "README.md"])
COMMAND = re.compile(
    r"^\$ (?:[^\s=]+/)?tunery (.+)$|`(?:\S+/)?tunery ([a-z-][^`\n]*)`", re.MULTILINE
)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
TARGET = re.compile(r"(?:^\$ |`)make ([a-z-]+)", re.MULTILINE)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands() -> set[str]:
    texts = (page.read_text("utf-8").replace("\\\n", " ") for page in PAGES)
    found = (match for text in texts for match in COMMAND.finditer(text))
    return {match.group(1) or match.group(2) for match in found}


def follow(command: Any, words: list[str]) -> None:
    """Down the tree of commands, then through the options of the one it leads to."""
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("-") and word not in options]
    assert not unknown, f"there is no option {unknown}"


@pytest.mark.parametrize("line", sorted(commands()))
def test_a_command_on_a_page_is_one_of_ours(line: str) -> None:
    words = shlex.split(line, comments=True)
    follow(typer.main.get_command(app), [word for word in words if word not in ("...", "…")])


def test_what_is_no_command_is_found_out() -> None:
    with pytest.raises(AssertionError, match="no command 'fly'"):
        follow(typer.main.get_command(app), ["jobs", "fly"])
    with pytest.raises(AssertionError, match="no option"):
        follow(typer.main.get_command(app), ["jobs", "ls", "--fly"])
    assert "jobs ls" in commands()


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]
    assert [link for link in targets if not (page.parent / link).exists()] == []


@every_page
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(TARGET.findall(page.read_text("utf-8"))) <= known
