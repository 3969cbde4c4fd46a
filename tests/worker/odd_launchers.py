"""Launchers that tests hand to the lifeline: one behaviour each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def leave_with_7(workdir: Path, events: int) -> int:
    os.write(events, b"hello\n")
    sys.stdout.write("on the log\n")
    return 7


def raise_an_error(workdir: Path, events: int) -> int:
    raise RuntimeError("no such luck")


def sleep(workdir: Path, events: int) -> int:
    os.write(events, b"hello\n")
    time.sleep(60)
    return 0


def sleep_deaf(workdir: Path, events: int) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return sleep(workdir, events)


def tell_signals(workdir: Path, events: int) -> int:
    got: list[str] = []
    signal.signal(signal.SIGTERM, lambda *_: got.append("TERM"))
    signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
    os.write(events, b"hello\n")
    while len(got) < 2:
        time.sleep(0.01)
    os.write(events, " ".join(got).encode())
    return 75


def scatter(workdir: Path, events: int) -> int:
    """A child, and a grandchild that has left for a session of its own and lost its parent."""
    code = (
        "import subprocess;"
        "quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(subprocess.Popen(['sleep', '60'], start_new_session=True, **quiet).pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    child = subprocess.Popen(["sleep", "60"])
    os.write(events, b"%d %d\n" % (child.pid, int(done.stdout)))
    time.sleep(60)
    return 0


def scatter_and_leave(workdir: Path, events: int) -> int:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    os.write(events, b"%d\n" % child.pid)
    return 0


def tell_surroundings(workdir: Path, events: int) -> int:
    """Open descriptors, the events' one, tasks, working directory and environment."""
    fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    tasks = len(os.listdir("/proc/self/task"))
    os.write(events, repr((fds, events, tasks, os.getcwd(), dict(os.environ))).encode())
    return 0


def add_in_parallel(workdir: Path, events: int) -> int:
    """Large enough that torch's thread pool takes part: hangs after an unlucky fork."""
    began = time.monotonic()
    import torch

    took_s = time.monotonic() - began
    torch.set_num_threads(2)
    a = torch.ones(512, 512)
    os.write(events, repr(((a @ a).sum().item(), took_s)).encode())
    return 0


def chatter(workdir: Path, events_fd: int) -> int:
    for number in range(100):
        os.write(events_fd, b"%d\n" % number)
        time.sleep(0.01)
    return 0
