from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from worker.environment import base_environment
from worker.lifeline import Order, Reason
from worker.process import Exit, TrainerProcess, _Pipe
from worker.warm import WarmPool

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = str(Path(__file__).parent)
ENVIRONMENT = base_environment(os.environ) | {"PYTHONPATH": HERE}


def order(launcher: str, workdir: Path) -> Order:
    return Order(f"odd_launchers:{launcher}", str(workdir), 10.0, environment=ENVIRONMENT)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[WarmPool]:
    pool = WarmPool(tmp_path / "warm.sock", ["odd_launchers"], ENVIRONMENT)
    pool.ensure()
    while not (tmp_path / "warm.sock").exists():
        time.sleep(0.01)
    yield pool
    pool.stop()


@pytest.mark.parametrize("warm", [True, False])
async def test_events_log_and_exit_arrive(pool: WarmPool, tmp_path: Path, warm: bool) -> None:
    path = tmp_path / "warm.sock" if warm else None
    process = await TrainerProcess.start(order("leave_with_7", tmp_path), warm=path)
    assert process.warm is warm
    assert await process.events.readline() == b"hello\n"
    assert await process.log.read() == b"on the log\n"
    assert await process.wait() == Exit(7, Reason.EXITED)
    await process.close()


async def test_a_relaxed_reader_hears_everything_in_fewer_turns(
    pool: WarmPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    hear = _Pipe.data_received

    def count(pipe: _Pipe, data: bytes) -> None:
        turns.append(len(data))
        hear(pipe, data)

    monkeypatch.setattr(_Pipe, "data_received", count)
    process = await TrainerProcess.start(order("chatter", tmp_path), warm=tmp_path / "warm.sock")
    process.relax()
    assert (await process.events.read()).split() == [b"%d" % number for number in range(100)]
    assert len(turns) < 50
    assert (await process.wait()).code == 0
    await process.close()


async def test_a_pool_that_is_away_means_a_cold_start(tmp_path: Path) -> None:
    process = await TrainerProcess.start(
        order("leave_with_7", tmp_path), warm=tmp_path / "nobody.sock"
    )
    assert not process.warm
    assert (await process.wait()).code == 7
    await process.close()


async def test_a_pool_that_does_not_answer_means_a_cold_start_and_one_trainer(
    pool: WarmPool, tmp_path: Path
) -> None:
    assert pool.pid is not None
    os.kill(pool.pid, signal.SIGSTOP)
    process = await TrainerProcess.start(
        order("tell_surroundings", tmp_path), warm=tmp_path / "warm.sock", warm_wait_s=0.3
    )
    os.kill(pool.pid, signal.SIGCONT)
    assert not process.warm
    assert (await process.wait()).code == 0
    await process.close()
    await asyncio.sleep(0.2)  # the late request finds a closed pipe and comes to nothing
    children = Path(f"/proc/{pool.pid}/task/{pool.pid}/children").read_text().split()
    assert children == []


async def test_a_killed_lifeline_is_noticed_and_its_trainer_is_dead(tmp_path: Path) -> None:
    process = await TrainerProcess.start(order("sleep", tmp_path), warm=None)
    await process.events.readline()
    os.kill(process.lifeline, signal.SIGKILL)
    assert await process.wait() == Exit(None, None)
    assert await process.events.read() == b""  # closed: nobody writes any more
    await process.close()


async def test_closing_kills(tmp_path: Path) -> None:
    process = await TrainerProcess.start(order("sleep", tmp_path), warm=None)
    await process.events.readline()
    await process.close()
    assert not Path(f"/proc/{process.trainer}").exists()
