"""Starts the ranks of a run: torch's elastic launcher, for one rank as for many hosts.

Ranks are forked from this process, which has imported everything and has never touched CUDA; in a
warm pool it was itself forked from a server that had. Nothing is imported twice. Restarts happen at
job level, never here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers.utils.logging import disable_progress_bar

from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_FAILED, EXIT_STOPPED, FailureEvent, RunOrder, read_event

if TYPE_CHECKING:
    from tunery.training.protocol import Event

RENDEZVOUS = "TUNERY_RENDEZVOUS"
"""Environment: host:port where the hosts of a run meet; unset on a single host."""


def launch(workdir: Path, events_fd: int) -> int:
    """Run the order in `workdir/run.json` to its end; returns one of `protocol`'s exit codes.

    Args:
        events_fd: descriptor that rank 0 writes its events to, one JSON object per line.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    order = RunOrder.model_validate_json((workdir / "run.json").read_bytes())
    for left in workdir.glob("failure-rank*.json"):
        left.unlink()
    stop = StopFlag()
    stop.install()
    try:
        codes = elastic_launch(_config(order), _rank)(str(workdir), events_fd, stop)
    except ChildFailedError as error:
        return _report(order, workdir, events_fd, error)
    return int(max(codes.values(), default=EXIT_FAILED))


def _config(order: RunOrder) -> LaunchConfig:
    compute = order.spec.compute
    meeting = os.environ.get(RENDEZVOUS)
    return LaunchConfig(
        min_nodes=compute.nodes,
        max_nodes=compute.nodes,
        nproc_per_node=compute.gpus,
        run_id=f"{order.run}-{order.attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint=meeting or "127.0.0.1:0",
        local_addr=None if meeting else "127.0.0.1",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
        # Its own handler would kill the ranks; ours lets them write their checkpoint.
        signals_to_handle="SIGQUIT",
    )


def _rank(workdir: str, events_fd: int, stop: StopFlag) -> int:
    """One rank, in its own process.

    A failed rank exits with an error, so that the launcher ends the others instead of leaving them
    to wait for it.
    """
    _use_threads()
    folder = Path(workdir)
    order = RunOrder.model_validate_json((folder / "run.json").read_bytes())
    rank = int(os.environ["RANK"])

    def emit(event: Event) -> None:
        line = event.model_dump_json() + "\n"
        if isinstance(event, FailureEvent):
            (folder / f"failure-rank{rank}.json").write_text(line, "utf-8")
        if rank == 0:
            _write(events_fd, line)

    code = program.run(order, folder, emit, stop)
    if code not in (0, EXIT_STOPPED):
        sys.exit(code)
    return code


def _use_threads() -> None:
    """Use as many threads as this rank is given: a warm torch has read another environment."""
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))


def _write(descriptor: int, line: str) -> None:
    """All of it, whatever the pipe takes at once."""
    data = memoryview(line.encode())
    while data:
        data = data[os.write(descriptor, data) :]


def _report(order: RunOrder, workdir: Path, events_fd: int, error: ChildFailedError) -> int:
    """Say what a rank other than the speaking one failed of, or that one died without a word.

    Returns:
        `EXIT_FAILED`; 128 + n when a rank was killed by signal n, as a shell would say.
    """
    if (workdir / "failure-rank0.json").exists():
        return EXIT_FAILED
    told = sorted(workdir.glob("failure-rank*.json"))
    if told:
        _write(events_fd, read_event(told[0].read_bytes()).model_dump_json() + "\n")
        return EXIT_FAILED
    rank, first = error.get_first_failure()
    print(f"rank {rank} ended with exit code {first.exitcode}", file=sys.stderr)  # noqa: T201 - the log
    return 128 - first.exitcode if first.exitcode < 0 else EXIT_FAILED
