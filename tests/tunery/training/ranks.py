"""Runs on one rank and on two, and how they are compared.

    python ranks.py FOLDER...

runs orders on two gloo ranks, one after another, in forks of one process that has imported torch.
Each folder has a `run.json`, and gets the events as `events.jsonl`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunery.spec import Checkpoints, Compute
from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_DONE, RunOrder, read_event

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.training.protocol import Event

REPOSITORY = Path(__file__).parents[3]
# Five examples a step in micro-batches of at most 48 tokens: ranks get unlike numbers of them.
CONFIG = {"max_steps": 4, "batch_size": 5, "weight_decay": 0.1, "max_grad_norm": 0.5}
STEP_2 = "checkpoints/step-00000002/resume"
EXPORT = "checkpoints/step-00000004/export"
WORLD = 2


def alone(order: RunOrder, folder: Path) -> list[Any]:
    folder.mkdir()
    events: list[Any] = []
    assert program.run(order, folder, events.append, StopFlag()) == EXIT_DONE
    return events


def on_two_ranks(orders: Mapping[str, RunOrder], home: Path) -> dict[str, list[Any]]:
    """One after another, in the same two processes; each in a folder of its name."""
    folders = [home / name for name in orders]
    for folder, order in zip(folders, orders.values(), strict=True):
        folder.mkdir()
        (folder / "run.json").write_text(order.model_dump_json())
    done = subprocess.run(
        [sys.executable, __file__, *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return {
        name: [
            read_event(line) for line in (home / name / "events.jsonl").read_bytes().splitlines()
        ]
        for name in orders
    }


def series(events: list[Any], name: str) -> dict[int, float]:
    points = [event for event in events if event.kind == "metrics"]
    return {e.step: e.values[name] for e in points if name in e.values}


def features(events: list[Any]) -> dict[str, Any]:
    return next(event for event in events if event.kind == "start").features  # type: ignore[no-any-return]


def compute(strategy: str, **more: Any) -> dict[str, Any]:
    ranks = 1 if strategy == "single" else 2
    return {
        "compute": Compute(gpus=ranks, strategy=strategy, micro_batch_tokens=48, **more),  # type: ignore[arg-type]
        "checkpoints": Checkpoints(every_steps=2),
    }


def close(ours: list[Any], theirs: list[Any], *names: str) -> None:
    for name in names or ("train_loss", "grad_norm"):
        expected = series(theirs, name)
        assert expected, name
        assert series(ours, name) == pytest.approx(expected, abs=1e-4), name


def resume_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STEP_2 / "optimizer.safetensors")


def loads_like_any(base: Path, one: Path, other: Path) -> None:
    """The adapters that two runs left, by stock PEFT."""
    configs = [
        json.loads((run / EXPORT / "adapter_config.json").read_text()) for run in (one, other)
    ]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    logits = []
    for run in (one, other):
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            logits.append(
                PeftModel.from_pretrained(model, run / EXPORT)(torch.arange(8)[None]).logits
            )
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def rank(number: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    order = RunOrder.model_validate_json((folder / "run.json").read_bytes())
    with (folder / "events.jsonl").open("a") as events:

        def emit(event: Event) -> None:
            events.write(event.model_dump_json() + "\n")
            events.flush()

        code = program.run(order, folder, emit, StopFlag())
    if code != EXIT_DONE:
        sys.exit(code)


def both(folder: Path) -> int:
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [context.Process(target=rank, args=(number, folder, port)) for number in range(WORLD)]
    for one in ranks:
        one.start()
    running = {one.sentinel: one for one in ranks}
    while running:
        for sentinel in wait(list(running)):
            ended = running.pop(sentinel)  # type: ignore[call-overload]
            ended.join()
            if ended.exitcode:  # The other one waits for it.
                for left in running.values():
                    left.kill()
    return max(abs(one.exitcode or 0) for one in ranks)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main(folders: Sequence[str]) -> int:
    if any("deepspeed_zero" in Path(folder, "run.json").read_text() for folder in folders):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401 - once, not in every fork
    return next((code for folder in folders if (code := both(Path(folder)))), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
