"""Torch's FSDP2: every rank keeps a part of each tensor, and has a block whole while it runs it.

Base and adapter are divided alike, along the first axis, block by block, so that a device needs
room for its part of the model and for two blocks. Single numbers, and what several blocks share,
every rank keeps whole. The optimizer is the other engines', over this
rank's parts: AdamW looks at each number alone. Resume files are the other engines' too, whole
tensors by parameter name, so that a run may be resumed by another strategy or number of ranks.

The base model is read on the host by every rank and moved to its device block by block, already
divided: no device ever holds all of it. What two ranks on CPUs cannot show: that gathering a block
overlaps with running the one before it, that offloaded parts are pinned and copied beside the
computation, and NCCL's own faults.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tunery.errors import CheckpointCorrupt, NotSupported
from tunery.training.engines.ddp import DdpEngine
from tunery.training.engines.single import STATE
from tunery.training.optimizer import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from tunery.training.optimizer import OptimizerSettings

STRATEGIES = frozenset({"fsdp"})
_PARTS = ("value", "exp_avg", "exp_avg_sq")


class FsdpEngine(DdpEngine):
    """Forward and backward passes talk to the other ranks.

    Args:
        offload: whether parts of parameters, gradients and moments wait in the host's memory, where
            AdamW updates them; a block visits the device while it runs.
    """

    even = True
    places_model = True

    def __init__(self, *, offload: bool = False) -> None:
        self._offload = offload

    def start(self, device: torch.device) -> None:
        super().start(device)
        self._device = device

    def prepare(self, model: nn.Module, settings: OptimizerSettings) -> None:
        _refuse(model, settings, offload=self._offload)
        self.model = model
        self._broadcast(model)
        self._root = _root_of(model)
        self._divide()
        _move_rest(model, self._device)
        self._every = dict(model.named_parameters())
        self._trained = {name: p for name, p in self._every.items() if p.requires_grad}
        self._whole_ones = [p for p in self._trained.values() if not isinstance(p, DTensor)]
        # Views of this rank's parts: what AdamW writes, the next gathering reads.
        self._mine = {name: torch.nn.Parameter(_part(p)) for name, p in self._trained.items()}
        self.optimizer = Optimizer(self._mine.items(), replace(settings, flat=False))

    def _broadcast(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                on_host = parameter.device.type == "cpu"
                dist.broadcast(parameter.data, src=0, group=self._host if on_host else None)

    def _divide(self) -> None:
        mesh = init_device_mesh(self._device.type, (self.world,))
        options: dict[str, Any] = {
            "mesh": mesh,
            # Sums of half-precision gradients lose what single ones have.
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
            "ignored_params": kept_whole(self._root),
        }
        if self._offload:
            cuda = self._device.type == "cuda"
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
        for parameter in self._root.parameters():
            parameter.data = parameter.data.contiguous()
        for block in blocks(self._root):
            fully_shard(block, **options)
        fully_shard(self._root, **options)

    # Steps

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # FSDP takes the mean over ranks; the loop's losses are to be summed.
        (loss * self.world).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor:
        for parameter in self._whole_ones:
            if parameter.grad is not None:
                # Losses are scaled for a mean over ranks.
                dist.all_reduce(parameter.grad.div_(self.world))
        for name, parameter in self._trained.items():
            mine = self._mine[name]
            grad = parameter.grad
            mine.grad = torch.zeros_like(mine) if grad is None else _part(grad)
        norm = self.optimizer.step(self._norm_of_all)
        self.discard()
        return norm

    def _norm_of_all(self, norm: Tensor) -> Tensor:
        squares = norm.detach().to(self._device).square()
        dist.all_reduce(squares)
        for parameter in self._whole_ones:  # Every rank has counted them.
            if parameter.grad is not None:
                squares -= (self.world - 1) * parameter.grad.float().square().sum()
        return squares.clamp(min=0).sqrt().to(norm.device)

    def calibrate(self) -> None:
        """Never called: `prepare` refuses adapters with a hook, which alone ask for it.

        Raises:
            NotSupported: always.
        """
        raise NotSupported("gradients that are divided among ranks are not shown to adapters")

    def discard(self) -> None:
        self._root.reshard()
        for parameter in self._trained.values():
            parameter.grad = None
        self.optimizer.discard()

    # Saving and restoring

    def weights(self) -> dict[str, Tensor]:
        # An evaluation leaves the root's parameters whole, and they are other objects then.
        self._root.reshard()
        return {
            name: whole for name in self._exported() if (whole := self._saved(name)) is not None
        }

    def _exported(self) -> Iterator[str]:
        """What trains, and what an export needs of the rest: of an adapter its frozen tensors, of a
        whole model all."""
        prefix = getattr(getattr(self.model, "base_model", None), "prefix", None)
        is_adapter = hasattr(self.model, "peft_config")
        for name in self._every:
            own = prefix in name if is_adapter and prefix else not is_adapter
            if name in self._trained or own:
                yield name

    def _saved(self, name: str) -> Tensor | None:
        parameter = self._every[name]
        whole = self._whole(parameter, _part(parameter))
        return whole.detach().cpu().clone() if self.rank == 0 else None

    @torch.no_grad()
    def _whole(self, like: Any, part: Tensor) -> Tensor:
        """The tensor of which each rank has the part that it has of `like`."""
        if not isinstance(like, DTensor):
            return part
        divided = DTensor.from_local(
            part.detach().to(self._device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return divided.full_tensor()

    def snapshot(self) -> Callable[[Path], None]:
        parts = self.optimizer.state()
        state: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            for part in _PARTS:
                key = f"{name}.{part}"
                whole = self._whole(parameter, parts[key])
                if self.rank == 0:
                    state[key] = whole.cpu()
        if self.rank:
            return lambda folder: None
        return lambda folder: save_file(state, folder / STATE)

    @torch.no_grad()
    def restore(self, folder: Path, steps: int, earlier: int = 0) -> None:
        try:
            state = load_file(folder / STATE)
        except (OSError, SafetensorError) as error:
            raise CheckpointCorrupt(f"{STATE} cannot be read ({type(error).__name__})") from error
        self._check(state)
        self._root.reshard()
        parts = {
            key: _part_of(state[key], parameter)
            for name, parameter in self._trained.items()
            for key in (f"{name}.{part}" for part in _PARTS)
        }
        self.optimizer.load(parts, steps, earlier)

    def _check(self, state: Mapping[str, Tensor]) -> None:
        wanted = {f"{n}.{part}": p.shape for n, p in self._trained.items() for part in _PARTS}
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            raise CheckpointCorrupt(
                "the checkpoint's trained parameters are not those of this run",
                hint="resume with the adapter settings that the checkpoint was made with",
            )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, gathered one at a time: the members of its outermost lists.

    The root has the rest, with the embeddings, tied or not.
    """
    found = {id(m): m for m in _members(model) if any(True for _ in m.parameters())}
    return list(found.values())


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """What is not divided: single numbers, and parameters that a block shares with what is outside
    of it, which would have to be gathered for both."""
    uses = _uses(model)
    whole = {p for p in model.parameters() if p.ndim == 0}
    for block in blocks(model):
        here = _uses(block)
        whole |= {p for p in block.parameters() if here[id(p)] != uses[id(p)]}
    return whole


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _members(child)


def _uses(module: nn.Module) -> Counter[int]:
    """By how many modules in `module` each parameter is held."""
    parts = module.named_modules(remove_duplicate=False)
    return Counter(id(p) for _, part in parts for p in part.parameters(recurse=False))


def _root_of(model: nn.Module) -> Any:
    """The transformers model: what PEFT calls, and what a rollout calls past PEFT."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Buffers and scalars, which every rank has whole."""
    for tensor in (*model.buffers(), *model.parameters()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def _part(tensor: Any) -> Tensor:
    """This rank's part, a view."""
    whole = tensor.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole


def _part_of(whole: Tensor, like: Any) -> Tensor:
    """This rank's part of a tensor that every rank has whole; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    divided = distribute_tensor(
        whole.to(like.to_local().device), like.device_mesh, like.placements, src_data_rank=None
    )
    return divided.to_local()


def _refuse(model: nn.Module, settings: OptimizerSettings, *, offload: bool) -> None:
    """What parts of tensors do not allow.

    Raises:
        NotSupported: names a strategy that does.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    reason = None
    if settings.hook is not None:
        reason = "this adapter looks at each step's gradients, which are divided among ranks"
    elif any(config.is_prompt_learning for config in adapters.values()):
        # PEFT reads the embeddings outside the base's own forward pass, where they are divided.
        reason = "fsdp cannot divide the base of a soft prompt or prefix"
    elif offload and any(p.requires_grad for p in kept_whole(_root_of(model))):
        reason = "fsdp cannot leave on the host what blocks of this adapter share"
    elif len({p.dtype for p in trained}) > 1:
        reason = "fsdp sums gradients of one precision, and what trains here has several"
    if reason:
        raise NotSupported(reason, hint="use ddp", param="ext.compute.strategy")


def make(strategy: str, offload: str) -> FsdpEngine:
    return FsdpEngine(offload=offload == "parameters")
