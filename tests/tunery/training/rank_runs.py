"""Orders on two gloo ranks, one after another, in processes that import torch once.

    python rank_runs.py FOLDER...

Each folder has a `run.json`, and gets rank 0's events as `events.jsonl`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_DONE, RunOrder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunery.training.protocol import Event

WORLD = 2


def rank(number: int, runs: Sequence[tuple[str, int]]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD)}
    for folder, port in runs:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = _run(Path(folder))
        if code != EXIT_DONE:
            sys.exit(code)


def _run(folder: Path) -> int:
    order = RunOrder.model_validate_json((folder / "run.json").read_bytes())
    with (folder / "events.jsonl").open("a") as events:

        def emit(event: Event) -> None:
            events.write(event.model_dump_json() + "\n")
            events.flush()

        return program.run(order, folder, emit, StopFlag())


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main(folders: Sequence[str]) -> int:
    runs = list(zip(folders, _free_ports(len(folders)), strict=True))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(number, runs)) for number in range(WORLD)]
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
