"""What an attempt leaves on the disk, and what is cleared away."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from worker.attempt import open_scratch, sweep_scratch

if TYPE_CHECKING:
    from pathlib import Path


def test_only_folders_that_nobody_holds_are_swept(tmp_path: Path) -> None:
    held = open_scratch(tmp_path / "held")
    os.close(open_scratch(tmp_path / "left"))
    (tmp_path / "stray file").write_text("not ours")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    assert sweep_scratch(tmp_path) == ["left"]
    assert {path.name for path in tmp_path.iterdir()} == {"held", "stray file", "foreign", "odd"}
    os.close(held)
    assert sweep_scratch(tmp_path) == ["held"]


def test_a_scratch_that_is_not_there_yet_needs_no_sweep(tmp_path: Path) -> None:
    assert sweep_scratch(tmp_path / "later") == []
