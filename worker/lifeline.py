"""The lifeline: a small process between the supervisor and the trainer's process group.

    supervisor --control pipe--> lifeline ---- trainer (own session and group) ---- its children
               <--status pipe---

The trainer must be dead before anybody else may claim its job. So the lifeline kills the whole
group, and everything that was re-parented to it, when the supervisor's end of the control pipe
closes (it died), when no renewal came in time (it froze, or lost the database), or when told. It
runs no library code of the trainer's, holds no secret and needs nothing but Linux.

Control messages are nine bytes: a letter and a float64, `CLOCK_MONOTONIC` seconds, which all
processes of a machine share. A renewal carries the moment at which the *successful* heartbeat was
begun: time spent on its way to us is not granted twice.

Status messages are JSON lines: `{"lifeline": pid, "trainer": pid}` once, then
`{"exit": code, "reason": "exited|told|closed|deadman", "survivors": n}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import struct
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONTROL = struct.Struct("=cd")
RENEW, STOP, CHECKPOINT, KILL = b"r", b"s", b"c", b"k"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_REAP_LIMIT_S = 10.0
"""A process in uninterruptible sleep outlives SIGKILL; past this it is reported, not awaited."""


class Reason(StrEnum):
    """Why the trainer is gone."""

    EXITED = "exited"  #: by itself
    TOLD = "told"  #: a kill message
    CLOSED = "closed"  #: the supervisor is gone
    DEADMAN = "deadman"  #: no renewal in time


@dataclass(frozen=True)
class Order:
    """What the lifeline is to start."""

    launcher: str
    """`module:function`; called with the work directory (Path) and the events descriptor (int),
    returns the exit code."""
    workdir: str
    deadman_s: float
    renewed_at: float | None = None
    """When (`CLOCK_MONOTONIC`) the last heartbeat that succeeded was begun; None: now."""
    environment: dict[str, str] = field(default_factory=dict)
    """The trainer's whole environment. A preloaded torch has read `OMP_NUM_THREADS` before the
    fork, and telling it again here would start the thread pool in a process that forks its ranks:
    each rank does that for itself."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Order:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Descriptors:
    """The lifeline's ends of its pipes, and locks that it holds for as long as it lives."""

    control: int
    status: int
    events: int
    log: int
    locks: tuple[int, ...] = ()

    @classmethod
    def of(cls, fds: Sequence[int]) -> Descriptors:
        control, status, events, log, *locks = fds
        return cls(control, status, events, log, tuple(locks))

    def all(self) -> list[int]:
        return [self.control, self.status, self.events, self.log, *self.locks]


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def run(order: Order, fds: Descriptors) -> None:
    """Be the lifeline of one trainer; returns when nothing of it is left.

    The caller is a process of its own that does nothing afterwards: its session, its children and
    its signal handlers are taken over.
    """
    with contextlib.suppress(PermissionError):  # a session leader already, when started cold
        os.setsid()
    # Service managers signal whole control groups; the trainer then stops by itself, and we stay
    # to see it out.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Blocked, not ignored: a stop that reaches the child before it is ready waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    renewed_at = time.monotonic() if order.renewed_at is None else order.renewed_at
    deadline = renewed_at + order.deadman_s
    us = os.getpid()
    trainer = os.fork()
    if trainer == 0:
        _enter(order, fds, parent=us)
    os.close(fds.events)
    os.close(fds.log)
    _say(fds.status, {"lifeline": us, "trainer": trainer})
    reason = _watch(trainer, fds.control, deadline, order.deadman_s)
    code, survivors = _end(trainer)
    _say(fds.status, {"exit": code, "reason": reason, "survivors": survivors})


def _watch(trainer: int, control: int, deadline: float, deadman_s: float) -> Reason:
    """Wait until the trainer exits or must be killed."""
    pidfd = os.pidfd_open(trainer)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        left_s = deadline - time.monotonic()
        # Asked once even when time is up: a renewal may lie in the pipe since before we began.
        ready = {fd for fd, _ in poll.poll(max(0.0, left_s) * 1000)}
        if pidfd in ready:
            return Reason.EXITED
        if control not in ready:
            if left_s <= 0:
                return Reason.DEADMAN
            continue
        data = os.read(control, CONTROL.size * 64)
        if not data:
            return Reason.CLOSED
        # Writes below PIPE_BUF are atomic, so messages arrive whole.
        for letter, at in CONTROL.iter_unpack(data):
            if letter == RENEW:
                deadline = max(deadline, min(at, time.monotonic()) + deadman_s)
            elif letter == STOP:
                _signal(trainer, signal.SIGTERM)
            elif letter == CHECKPOINT:
                _signal(trainer, signal.SIGUSR1)
            elif letter == KILL:
                return Reason.TOLD


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _end(trainer: int) -> tuple[int | None, int]:
    """Kill what is left below us and reap it.

    All descendants belong to this attempt: we started exactly one process. The group goes first,
    in one call; then those that left it, which are ours because we are their subreaper.

    Returns:
        The trainer's exit code (minus the signal's number when it was killed), and how many
        processes could not be reaped.
    """
    code: int | None = None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(trainer, signal.SIGKILL)
    give_up = time.monotonic() + _REAP_LIMIT_S
    while True:
        for pid in descendants(os.getpid()):
            _signal(pid, signal.SIGKILL)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == trainer:
                    code = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            return code, 0
        if time.monotonic() > give_up:
            return code, len(list(descendants(os.getpid())))
        time.sleep(0.005)


def descendants(root: int) -> Iterator[int]:
    """Process ids below `root`, nearest first, as /proc tells at this moment."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (parent := _parent(entry.name)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    pending = [root]
    while pending:
        found = children.get(pending.pop(0), [])
        pending += found
        yield from found


def _parent(pid: str) -> int | None:
    try:
        stat = Path("/proc", pid, "stat").read_bytes()
    except OSError:
        return None
    # "pid (name) state ppid ...": the name may hold spaces and brackets.
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


def _say(status: int, message: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        os.write(status, json.dumps(message).encode() + b"\n")


def _enter(order: Order, fds: Descriptors, *, parent: int) -> NoReturn:
    """Become the trainer: own session, own environment, only its own descriptors."""
    code = 1
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked to die with it
            os._exit(code)
        _inherit_nothing(fds.events, fds.log)
        os.chdir(order.workdir)
        os.environ.clear()
        os.environ.update(order.environment)
        module, _, function = order.launcher.partition(":")
        launch = getattr(importlib.import_module(module), function)
        code = int(launch(Path(order.workdir), fds.events))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: above us are the lifeline's frames, or the warm pool's.
        os._exit(code)


def _inherit_nothing(events: int, log: int) -> None:
    """Keep stdin empty, both outputs on `log`, `events`, and close all else."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # SIGUSR1 stays ignored until the trainer handles it: asking for a checkpoint must not kill.
    empty = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((empty, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.closerange(3, events)
    os.closerange(events + 1, os.sysconf("SC_OPEN_MAX"))
    os.set_inheritable(events, True)
    with contextlib.suppress(OSError):  # the kernel's first choice when memory runs out
        Path("/proc/self/oom_score_adj").write_text("500")


def main(arguments: list[str]) -> int:
    """Cold start: `python -m worker.lifeline ORDER FD,FD,...`."""
    run(Order.from_json(arguments[0]), Descriptors.of([int(n) for n in arguments[1].split(",")]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
