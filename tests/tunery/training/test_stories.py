"""Real weights and real text: what is trained is learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tunery.spec import Use
from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_DONE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_twenty_steps_teach_a_storyteller_shakespeare(
    make_order: Any, shared_dir: Path, tmp_path: Path
) -> None:
    text = (shared_dir / "data/tinyshakespeare/input.txt").read_text()
    rows = [{"text": text[i * 2000 : i * 2000 + 300]} for i in range(320)]
    held_out = [{"text": text[-1 - (i + 1) * 2000 :][:300]} for i in range(24)]
    order = make_order(
        rows,
        held_out,
        format="text",
        base=shared_dir / "models/stories260K",
        adapter=Use(type="lora", config={"r": 8, "lora_alpha": 16}),
        config={"max_steps": 20, "batch_size": 16, "max_length": 128, "warmup_steps": 2},
    )
    events: list[Any] = []
    assert program.run(order, tmp_path, events.append, StopFlag()) == EXIT_DONE
    losses = [
        event.values["valid_loss"]
        for event in events
        if event.kind == "metrics" and "valid_loss" in event.values
    ]
    assert losses[0] > 4.2
    assert losses[-1] < 3.4
