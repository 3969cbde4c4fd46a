"""What a trainer's environment holds: an allow-list, so that a new secret of ours stays ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEPT = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"}
    | {"VIRTUAL_ENV", "CUDA_HOME", "CUDA_PATH", "CUDA_MODULE_LOADING", "CUDA_DEVICE_ORDER"}
    | {"CUDA_DEVICE_MAX_CONNECTIONS", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    | {"TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
)
KEPT_PREFIXES = ("NCCL_", "GLOO_", "PYTORCH_", "TORCH_NCCL_")
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000"}
"""A thread that waits for another spins this many rounds before it sleeps: libgomp's own figure for
a machine with more threads than cores. Its default is 300 times that, and a trainer whose cores are
shared, if only with our own heartbeat, then burns the time that the other thread needs."""


def base_environment(own: Mapping[str, str]) -> dict[str, str]:
    """What trainers and the warm pool share: ours, reduced, plus what is true for all."""
    kept = {
        name: value for name, value in own.items() if name in KEPT or name.startswith(KEPT_PREFIXES)
    }
    return (
        SHORT_SPIN
        | kept
        | {
            # The base model lies on disk before a trainer starts; nothing is fetched by it.
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive our forks
            "PYTHONUNBUFFERED": "1",
            # Else asking whether there is a device initialises it, and no fork survives that.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
    )


def warm_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The warm pool's: one thread, and no device to touch by accident."""
    return base_environment(own) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def trainer_environment(
    own: Mapping[str, str], *, devices: Sequence[str], threads: int
) -> dict[str, str]:
    """A trainer's: its devices (indices or UUIDs; none for CPU) and CPU threads per rank."""
    return base_environment(own) | {
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "OMP_NUM_THREADS": str(threads),
    }
