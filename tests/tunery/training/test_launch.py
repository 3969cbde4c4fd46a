"""Real processes: cold starts, two ranks, signals, and ranks that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tunery.spec import Checkpoints, Compute, Use
from tunery.training.protocol import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, read_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tunery.training.protocol import RunOrder

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[3]


class Process:
    """A cold start with its events on a pipe."""

    def __init__(self, order: RunOrder, folder: Path, **environment: str) -> None:
        folder.mkdir()
        (folder / "run.json").write_text(order.model_dump_json())
        reader, writer = os.pipe()
        self.log = folder / "trainer.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tunery.training.program",
                    folder,
                    "--events-fd",
                    str(writer),
                ],
                pass_fds=[writer],
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
            )
        os.close(writer)
        self._lines = os.fdopen(reader, "rb")
        self.events: list[Any] = []

    def hear(self) -> Iterator[Any]:
        for line in self._lines:
            self.events.append(read_event(line))
            yield self.events[-1]

    def until(self, wanted: Callable[[Any], bool]) -> Any:
        return next(event for event in self.hear() if wanted(event))

    def ended(self) -> int:
        for _ in self.hear():
            pass
        return self.process.wait(60)

    def kind(self, name: str) -> list[Any]:
        return [event for event in self.events if event.kind == name]

    def series(self, name: str) -> dict[int, float]:
        return {e.step: e.values[name] for e in self.kind("metrics") if name in e.values}

    def close(self) -> None:
        self._lines.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(order: RunOrder, name: str = "work", **environment: str) -> Process:
        started.append(Process(order, tmp_path / name, **environment))
        return started[-1]

    yield make
    for process in started:
        process.close()


LONG = {"max_steps": 5000, "lr_scheduler_type": "constant"}


def at_step(step: int) -> Callable[[Any], bool]:
    return lambda event: event.kind == "metrics" and event.step >= step


def test_two_ranks_have_the_losses_of_one(make_order: Any, chats: Any, start: Any) -> None:
    config = {"max_steps": 6, "batch_size": 5}
    rows, valid = chats(13), chats(5, seed=1)
    one = start(make_order(rows, valid, config=config), "one")
    assert one.ended() == EXIT_DONE, one.log.read_text()
    compute = Compute(gpus=2, strategy="ddp")
    two = start(make_order(rows, valid, config=config, compute=compute), "two")
    assert two.ended() == EXIT_DONE, two.log.read_text()
    for name in ("train_loss", "valid_loss", "train_mean_token_accuracy"):
        assert two.series(name) == pytest.approx(one.series(name), abs=1e-5), name
    assert two.series("grad_norm") == pytest.approx(one.series("grad_norm"), abs=1e-4)
    assert two.kind("start")[0].features["ranks"] == 2
    assert two.kind("done")[0].trained_tokens == one.kind("done")[0].trained_tokens


def test_a_batch_smaller_than_the_ranks_trains(make_order: Any, chats: Any, start: Any) -> None:
    config = {"max_steps": 4, "batch_size": 1}
    one = start(make_order(chats(3), config=config), "one")
    assert one.ended() == EXIT_DONE, one.log.read_text()
    two = start(make_order(chats(3), config=config, compute=Compute(gpus=2, strategy="ddp")), "two")
    assert two.ended() == EXIT_DONE, two.log.read_text()
    assert two.series("train_loss") == pytest.approx(one.series("train_loss"), abs=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_stops_with_a_checkpoint_and_the_run_goes_on_from_it(
    make_order: Any, chats: Any, start: Any, ranks: int
) -> None:
    compute = Compute(gpus=ranks, strategy="single" if ranks == 1 else "ddp")
    order = make_order(chats(10), config=LONG, compute=compute)
    first = start(order, "first")
    first.until(at_step(3))
    first.process.send_signal(signal.SIGTERM)
    assert first.ended() == EXIT_STOPPED, first.log.read_text()
    saved = first.kind("checkpoint")[-1]
    assert saved.step == max(first.series("train_loss"))
    again = order.model_copy(update={"resume_path": str(Path(saved.path) / "resume")})
    second = start(again, "second")
    said = second.until(at_step(saved.step + 1))
    assert said.step == saved.step + 1
    second.process.send_signal(signal.SIGTERM)
    assert second.ended() == EXIT_STOPPED


def test_sigterm_to_the_whole_group_stops_once(make_order: Any, chats: Any, start: Any) -> None:
    process = start(make_order(chats(10), config=LONG))
    process.until(at_step(2))
    os.killpg(process.process.pid, signal.SIGTERM)
    assert process.ended() == EXIT_STOPPED, process.log.read_text()
    assert len(process.kind("checkpoint")) == 1


def test_a_stop_that_comes_before_the_ranks_is_not_lost(
    make_order: Any, chats: Any, start: Any
) -> None:
    process = start(make_order(chats(10), config=LONG))
    process.until(lambda event: event.kind == "phase")
    process.process.send_signal(signal.SIGTERM)
    assert process.ended() == EXIT_STOPPED, process.log.read_text()
    assert process.kind("checkpoint")[-1].step == 1


def test_sigusr1_writes_a_checkpoint_and_goes_on(make_order: Any, chats: Any, start: Any) -> None:
    process = start(make_order(chats(10), config=LONG))
    process.until(at_step(2))
    process.process.send_signal(signal.SIGUSR1)
    saved = process.until(lambda event: event.kind == "checkpoint")
    process.until(at_step(saved.step + 2))
    process.process.send_signal(signal.SIGTERM)
    assert process.ended() == EXIT_STOPPED


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failure_is_said_once_and_ends_all_ranks(
    make_order: Any, chats: Any, start: Any, ranks: int, tmp_path: Path
) -> None:
    compute = Compute(gpus=ranks, strategy="single" if ranks == 1 else "ddp")
    order = make_order(chats(4), base=tmp_path / "nowhere", compute=compute)
    process = start(order)
    began = time.monotonic()
    assert process.ended() == EXIT_FAILED
    assert time.monotonic() - began < 60
    (failed,) = process.kind("failure")
    assert failed.code == "base_model_unavailable"


def test_a_killed_rank_ends_the_run_and_the_run_may_be_tried_again(
    make_order: Any, chats: Any, start: Any
) -> None:
    import psutil

    process = start(
        make_order(
            chats(10),
            config=LONG,
            compute=Compute(gpus=2, strategy="ddp"),
            checkpoints=Checkpoints(every_steps=2),
        )
    )
    process.until(at_step(3))
    ranks = psutil.Process(process.process.pid).children()
    victim = max(ranks, key=lambda child: child.pid)
    victim.kill()
    # Either the launcher sees the death first, or the other rank its silence.
    code = process.ended()
    assert code == (EXIT_FAILED if process.kind("failure") else 128 + signal.SIGKILL)
    for failed in process.kind("failure"):
        assert (failed.code, failed.retryable) == ("worker_lost", True)
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)


def test_the_base_is_learnt_by_a_full_run_over_two_ranks(
    make_order: Any, chats: Any, start: Any
) -> None:
    order = make_order(
        chats(10),
        chats(4, seed=1),
        config={"n_epochs": 2},
        adapter=Use(type="full"),
        compute=Compute(gpus=2, strategy="ddp"),
    )
    process = start(order)
    assert process.ended() == EXIT_DONE, process.log.read_text()
    held_out = process.series("valid_loss")
    assert held_out[max(held_out)] < held_out[0] - 0.2
