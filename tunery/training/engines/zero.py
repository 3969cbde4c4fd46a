"""DeepSpeed's ZeRO: 0 divides nothing, 1 the optimizer, 2 gradients too, 3 also weights.

The optimizer stays torch's AdamW, on the host too: DeepSpeed's own for CPUs is compiled at first
use, for over a minute. Resume files are those of the other engines, whole tensors by parameter
name, so that a run may be resumed by another strategy or number of ranks, and reading one never
runs a pickle. A device has to hold the whole model while it is loaded, at stage 3 too; fsdp needs
no such room. On CPUs offloading changes where nothing lies: two ranks show only that it trains.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tunery.errors import CheckpointCorrupt, NotSupported
from tunery.training.engines.ddp import DdpEngine
from tunery.training.engines.single import STATE
from tunery.training.optimizer import alike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from tunery.training.optimizer import OptimizerSettings

STRATEGIES = frozenset(f"deepspeed_zero{stage}" for stage in range(4))
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(DdpEngine):
    """ZeRO of one stage. Forward and backward passes talk to the other ranks.

    Args:
        offload: what waits in the host's memory. optimizer: masters and moments, which are updated
            there; parameters: those, and the divided weights of stage 3.
    """

    even = True

    def __init__(self, stage: int, offload: str = "none") -> None:
        self._stage, self._offload = stage, offload

    def start(self, device: torch.device) -> None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        super().start(device)
        self._device = device

    def prepare(self, model: nn.Module, settings: OptimizerSettings) -> None:
        import deepspeed
        from transformers import get_scheduler

        half = _half(model)
        self._refuse(model, half, settings)
        self.settings = settings
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._shapes = {name: parameter.shape for name, parameter in self._trained.items()}
        self._adamw = torch.optim.AdamW(
            self._groups(), lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon
        )
        self._schedule = get_scheduler(
            settings.schedule,
            self._adamw,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.total_steps,
        )
        _compile_nothing()
        deepspeed.init_distributed(
            dist_backend="nccl" if self._device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
        )
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=self._config(half)
        )[0]
        self.model = self._engine
        self._allocate_state()

    def _refuse(self, model: nn.Module, half: bool, settings: OptimizerSettings) -> None:
        """What this stage cannot do.

        Raises:
            NotSupported: names a strategy that can.
        """
        if half and self._stage == 0:
            raise NotSupported(
                "deepspeed_zero0 keeps no float32 weights beside bfloat16 ones",
                hint="use ddp, which is the same without DeepSpeed and does, or precision fp32",
                param="ext.compute.strategy",
            )
        if settings.hook is not None:
            raise NotSupported(
                "this adapter looks at each step's gradients, which DeepSpeed does not show",
                hint="use ddp",
                param="ext.compute.strategy",
            )
        adapters: dict[str, Any] = getattr(model, "peft_config", {})
        if self._stage == 3 and any(config.is_prompt_learning for config in adapters.values()):
            # PEFT runs the prompt's encoder to save it: on rank 0 alone, which waits for the rest.
            raise NotSupported(
                "deepspeed_zero3 cannot divide a soft prompt or prefix",
                hint="use ddp or deepspeed_zero2: it is small enough for every device",
                param="ext.compute.strategy",
            )

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay spares vectors, as in the other engines."""
        return [
            {
                "params": [parameter for _, parameter in members],
                "weight_decay": 0.0 if vectors else self.settings.weight_decay,
                "lr": self.settings.learning_rate * rate,
            }
            for (vectors, rate), members in alike(self._trained.items(), self.settings).items()
        ]

    def _config(self, half: bool) -> dict[str, Any]:
        cuda = self._device.type == "cuda"
        host = {"device": "cpu", "pin_memory": cuda}
        return {
            # Ranks and micro-batches are the loop's business: it hands over losses that add up.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.settings.max_grad_norm,
            "zero_optimization": {
                "stage": self._stage,
                "overlap_comm": cuda,
                **({"offload_optimizer": host} if self._offload != "none" else {}),
                **({"offload_param": host} if self._offload == "parameters" else {}),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": half},
            "steps_per_print": None,
        }

    def _masters(self) -> list[Tensor]:
        """What AdamW updates: float32, this rank's part of it."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        if self._stage:
            return list(self._engine.optimizer.single_partition_of_fp32_groups)
        return list(self._trained.values())

    def _allocate_state(self) -> None:
        """Before the first step, so that it can be saved and restored at any."""
        for master in self._masters():
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{name: torch.zeros_like(master) for name in _MOMENTS},
            }
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    # Steps

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over ranks; the loop's losses are to be summed.
        self._engine.backward(loss * self.world)

    def step(self) -> Tensor:
        norm = self._norm() if self._stage == 0 else None
        self._engine.step()
        self._schedule.step()
        if norm is None:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        return norm

    def calibrate(self) -> None:
        """Never called: `prepare` refuses adapters with a hook, which alone ask for it.

        Raises:
            NotSupported: always.
        """
        raise NotSupported("DeepSpeed's gradients are not shown to adapters")

    def _norm(self) -> Tensor:
        """Stage 0 clips without telling: the gradients are whole and summed after `backward`."""
        grads = [p.grad for p in self._trained.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def discard(self) -> None:
        self._engine.optimizer.zero_grad()
        if self._stage:
            self._engine.optimizer.averaged_gradients = {}

    def learning_rate_at(self, step: int) -> float:
        factor = self._schedule.lr_lambdas[0](step)
        return float(self.settings.learning_rate * factor)

    # Saving and restoring

    def weights(self) -> dict[str, Tensor]:
        return {
            name: whole.detach().cpu().clone() for name, whole in self._gathered() if self.rank == 0
        }

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters, each whole while it is looked at."""
        for name, parameter in self._trained.items():
            if self._stage < 3:
                yield name, parameter
                continue
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                yield name, parameter

    def snapshot(self) -> Callable[[Path], None]:
        state: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            for part in ("value", *_MOMENTS):
                whole = self._whole(parameter, part)
                if self.rank == 0:
                    state[f"{name}.{part}"] = whole.detach().cpu().view(self._shapes[name]).clone()
        if self.rank:
            return lambda folder: None
        return lambda folder: save_file(state, folder / STATE)

    def _whole(self, parameter: nn.Parameter, part: str) -> Tensor:
        """The float32 value or a moment of a parameter, from all ranks."""
        if self._stage == 0:
            mine: Tensor = parameter if part == "value" else self._adamw.state[parameter][part]
            return mine
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole: Tensor = (
            safe_get_full_fp32_param(parameter)
            if part == "value"
            else safe_get_full_optimizer_state(parameter, part)
        )
        return whole

    @torch.no_grad()
    def restore(self, folder: Path, steps: int, earlier: int = 0) -> None:
        state = load_file(folder / STATE)
        self._check(state)
        for name, parameter in self._trained.items():
            self._set_value(parameter, state[f"{name}.value"])
            for part in _MOMENTS:
                self._set_moment(parameter, part, state[f"{name}.{part}"])
        for master in self._masters():
            self._adamw.state[master]["step"].fill_(steps + earlier)
        for _ in range(steps - self._schedule.last_epoch):
            self._schedule.step()

    def _set_value(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self._stage < 3:
            parameter.copy_(value)
            if self._stage:
                from deepspeed.utils import safe_set_full_fp32_param

                safe_set_full_fp32_param(parameter, value.to(parameter.device))
            return
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param

        with GatheredParameters([parameter], modifier_rank=0):
            if self.rank == 0:
                parameter.copy_(value)
        safe_set_local_fp32_param(parameter, self._mine(parameter, value))

    def _set_moment(self, parameter: nn.Parameter, part: str, value: Tensor) -> None:
        if self._stage == 0:
            self._adamw.state[parameter][part].copy_(value)
        elif self._stage < 3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value.to(parameter.device), part)
        else:
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(parameter, self._mine(parameter, value), part)

    def _mine(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, padded as DeepSpeed pads the last rank's."""
        size = parameter.ds_tensor.numel()
        flat = torch.zeros(size * self.world, dtype=torch.float32, device=parameter.device)
        flat[: value.numel()] = value.reshape(-1)
        return flat[size * self.rank : size * (self.rank + 1)]

    def _check(self, state: Mapping[str, Tensor]) -> None:
        wanted = {
            f"{name}.{part}": shape
            for name, shape in self._shapes.items()
            for part in ("value", *_MOMENTS)
        }
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            raise CheckpointCorrupt(
                "the checkpoint's trained parameters are not those of this run",
                hint="resume with the adapter settings that the checkpoint was made with",
            )


def _compile_nothing() -> None:
    """On CPUs DeepSpeed builds a shared-memory all-reduce at first use: two minutes without it.

    gloo does the same, and works on processors that the kernel's instructions are missing on.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _half(model: nn.Module) -> bool:
    return any(p.dtype == torch.bfloat16 for p in model.parameters())


def make(strategy: str, offload: str) -> ZeroEngine:
    return ZeroEngine(int(strategy[-1]), offload)
