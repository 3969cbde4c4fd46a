"""Which devices this worker offers, and the locks that say which of them are in use."""

from __future__ import annotations

import fcntl
import os
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_SMI = ("nvidia-smi", "--format=csv,noheader,nounits")
_SLACK_BYTES = 512 << 20
"""What a driver may keep for itself after a process has gone."""
CPU_RANKS = 64
"""Ranks that a machine without accelerators runs, when one job has it to itself."""


@dataclass(frozen=True)
class Device:
    """One slot: a GPU, or a share of the machine's cores."""

    kind: str
    """`cuda` or `cpu`."""
    id: str
    """What `CUDA_VISIBLE_DEVICES` calls it; for cpu a running number."""
    name: str
    memory_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def offered(wanted: str, environment: Mapping[str, str]) -> list[Device]:
    """The devices that the setting `devices` names.

    Args:
        wanted: `auto` (all GPUs, else one CPU slot), `cpu`, `cpu:3` for three slots, or GPU
            indices such as `0,2`.

    Raises:
        InvalidConfig: an index that this machine does not have.
    """
    kind, _, count = wanted.partition(":")
    if kind == "cpu":
        return [Device("cpu", str(number), "CPU") for number in range(int(count or 1))]
    visible = _visible(_gpus(), environment.get("CUDA_VISIBLE_DEVICES"))
    if wanted == "auto":
        return visible or [Device("cpu", "0", "CPU")]
    by_id = {device.id: device for device in visible}
    missing = [index for index in wanted.split(",") if index not in by_id]
    if missing:
        raise InvalidConfig(
            f"no GPU {', '.join(missing)} on this machine; it has {sorted(by_id) or 'none'}",
            hint="set TUNERY_DEVICES to auto, cpu or indices of its GPUs",
        )
    return [by_id[index] for index in wanted.split(",")]


def _gpus() -> list[Device]:
    return [
        Device("cuda", index, name, _bytes(mib))
        for index, name, mib in _ask("index,name,memory.total")
    ]


def _ask(columns: str) -> list[list[str]]:
    """What the driver says of each GPU; it is asked in a process of its own, never loaded here."""
    command = [*_SMI, f"--query-gpu={columns}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]


def _bytes(mib: str) -> int | None:
    return int(mib) << 20 if mib.isdigit() else None


def memory_used(devices: Sequence[Device]) -> dict[str, int]:
    """Bytes in use on each GPU of `devices`, by its id; nothing for the CPU."""
    ids = {device.id for device in devices if device.kind == "cuda"}
    if not ids:
        return {}
    used = {index: _bytes(mib) for index, mib in _ask("index,memory.used")}
    return {index: size for index, size in used.items() if index in ids and size is not None}


def still_held(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """GPUs whose memory has not come back to what it was before."""
    return [index for index, size in now.items() if size > before.get(index, 0) + _SLACK_BYTES]


def _visible(gpus: Sequence[Device], mask: str | None) -> list[Device]:
    """What is left when the worker itself was given only some of them."""
    if mask is None:
        return list(gpus)
    allowed = [part.strip() for part in mask.split(",")]
    return [device for device in gpus if device.id in allowed]


@dataclass(frozen=True)
class Slot:
    """A device that we hold. The lock lasts until every process that holds `fd` is gone."""

    device: Device
    fd: int

    def release(self) -> None:
        """Close our descriptor; a lifeline that was given it keeps the device until it ends."""
        os.close(self.fd)


class Slots:
    """The worker's devices, one lock file each, shared by the supervisors of this machine."""

    def __init__(self, folder: Path, worker: str, devices: Sequence[Device]) -> None:
        self._folder = folder
        self._worker = worker
        self.devices = tuple(devices)
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def taking(self) -> Iterator[bool]:
        """Whether it is our turn to look for free devices: one supervisor does at a time."""
        fd = self._open(f"{self._worker}.taking")
        try:
            yield _try_lock(fd)
        finally:
            os.close(fd)

    def free(self) -> list[Slot]:
        """Lock and return every device that nobody holds. The caller releases what it spares."""
        held = []
        for device in self.devices:
            # A GPU is one thing for all workers of this machine; a CPU share is a worker's own.
            owner = "gpu" if device.kind == "cuda" else self._worker
            fd = self._open(f"{owner}-{device.id}.slot")
            if _try_lock(fd):
                held.append(Slot(device, fd))
            else:
                os.close(fd)
        return held

    def capacity(self, free: Sequence[Slot]) -> int:
        """How many ranks a job may want of these slots."""
        whole = len(free) == len(self.devices)
        if whole and all(slot.device.kind == "cpu" for slot in free):
            return CPU_RANKS
        return len(free)

    def _open(self, name: str) -> int:
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
