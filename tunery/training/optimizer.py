"""AdamW, its schedule and clipping, over whatever trains.

The trained tensors are laid end to end in one buffer, and the parameters become views of it: one
kernel then clips, one updates, one all-reduce sums over ranks, instead of one per tensor (LoRA on
32 layers has 448). Parameters in half precision keep a float32 master, without which updates
smaller than half a unit in the last place would vanish. Nothing here reads the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunery.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from tunery.training.hooks import StepHook

_MOMENTS = ("exp_avg", "exp_avg_sq")
_HOOK = "hook/"


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW and its schedule, all resolved."""

    learning_rate: float
    schedule: str
    warmup_steps: int
    total_steps: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    flat: bool = True
    rate: Callable[[str], float] | None = None
    """Multiplies the learning rate of the parameter of that name; None: all alike."""
    hook: StepHook | None = None
    """What the adapter does in each step beside the update."""

    def rate_of(self, name: str) -> float:
        """Multiplier of the parameter's learning rate."""
        return 1.0 if self.rate is None else self.rate(name)


@dataclass(slots=True)
class _Slot:
    """One parameter's place."""

    name: str
    parameter: nn.Parameter
    leaf: int
    offset: int

    def view(self, leaf: Tensor) -> Tensor:
        """The parameter's part of a leaf-shaped tensor."""
        size = self.parameter.numel()
        return leaf.reshape(-1)[self.offset : self.offset + size].view(self.parameter.shape)


class Optimizer:
    """Owns the trained parameters' update.

    Weight decay spares vectors (biases and norms), as `transformers.Trainer` does.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings
    ) -> None:
        from transformers import get_scheduler

        self.settings = settings
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._slots: list[_Slot] = []
        self._leaves: list[nn.Parameter] = []
        """What AdamW updates: float32."""
        self._grads: list[Tensor] = []
        """Flat only: where backward passes add up, in the parameters' own precision."""
        groups = []
        for (vectors, rate), members in alike(trained, settings).items():
            first = len(self._leaves)
            for dtype in sorted({p.dtype for _, p in members}, key=str):
                self._add([pair for pair in members if pair[1].dtype == dtype])
            decay = 0.0 if vectors else settings.weight_decay
            groups.append(
                {"params": self._leaves[first:], "weight_decay": decay, "multiplier": rate}
            )
        self.adamw = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )
        self._allocate_state()
        schedule = get_scheduler(
            settings.schedule,
            self.adamw,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.total_steps,
        )
        # The rate is a function of the step: nothing to save, nothing to replay.
        self._factor = schedule.lr_lambdas[0]
        self._steps = 0

    def _add(self, members: list[tuple[str, nn.Parameter]]) -> None:
        if not self.settings.flat:
            for name, parameter in members:
                self._slots.append(_Slot(name, parameter, len(self._leaves), 0))
                half = parameter.dtype != torch.float32
                master = torch.nn.Parameter(parameter.detach().float()) if half else parameter
                self._leaves.append(master)
            return
        total = sum(parameter.numel() for _, parameter in members)
        like = members[0][1]
        values = torch.empty(total, dtype=like.dtype, device=like.device)
        grads = torch.zeros_like(values)
        offset = 0
        for name, parameter in members:
            slot = _Slot(name, parameter, len(self._leaves), offset)
            slot.view(values).copy_(parameter.detach())
            parameter.data = slot.view(values)
            parameter.grad = slot.view(grads)
            self._slots.append(slot)
            offset += parameter.numel()
        self._grads.append(grads)
        half = values.dtype != torch.float32
        self._leaves.append(torch.nn.Parameter(values.float() if half else values))

    def _allocate_state(self) -> None:
        """Before the first step, so that the memory probe sees it and a step cannot run out."""
        for leaf in self._leaves:
            self.adamw.state[leaf] = {
                "step": torch.zeros((), dtype=torch.float32, device=leaf.device),
                **{name: torch.zeros_like(leaf) for name in _MOMENTS},
            }

    def learning_rate_at(self, step: int) -> float:
        """That the optimizer step after `step` steps is made with."""
        return float(self.settings.learning_rate * self._factor(step))

    def gradients(self) -> list[Tensor]:
        """What is to be summed over ranks, in place; zeros where nothing flowed."""
        if self.settings.flat:
            return self._grads
        for slot in self._slots:
            if slot.parameter.grad is None:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
        return [slot.parameter.grad for slot in self._slots if slot.parameter.grad is not None]

    def step(self, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Clip, update at the schedule's rate, drop the gradients.

        Args:
            total: from the norm of these gradients, that of all of which they are a part.

        Returns:
            The gradients' global L2 norm before clipping: float32 scalar on the device.
        """
        hook = self.settings.hook
        for leaf, gradient in zip(self._leaves, self._leaf_gradients(), strict=True):
            leaf.grad = gradient
        if hook is not None:
            hook.before_clip(self._named_gradients())
        norm = _clip(self._leaves, self.settings.max_grad_norm, total)
        if hook is not None:
            hook.after_clip(self._named_gradients(), self._steps)
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate_at(self._steps) * group["multiplier"]
        self.adamw.step()
        self._steps += 1
        self._publish()
        if hook is not None:
            hook.after_update(self._steps)
        self.discard()
        return norm

    def calibrate(self) -> None:
        """Show the gradients to the adapter's hook, and drop them."""
        assert self.settings.hook is not None
        for leaf, gradient in zip(self._leaves, self._leaf_gradients(), strict=True):
            leaf.grad = gradient
        self.settings.hook.calibrate(self._named_gradients())
        self.discard()

    def _named_gradients(self) -> dict[str, Tensor]:
        """Views of the float32 gradients, in the parameters' shapes, by parameter name."""
        return {
            slot.name: slot.view(grad)
            for slot in self._slots
            if (grad := self._leaves[slot.leaf].grad) is not None
        }

    def _leaf_gradients(self) -> list[Tensor | None]:
        if self.settings.flat:
            return [grad.float() for grad in self._grads]
        grads = [slot.parameter.grad for slot in self._slots]
        return [None if grad is None else grad.float() for grad in grads]

    @torch.no_grad()
    def _publish(self) -> None:
        """Masters to the half-precision parameters."""
        for slot in self._slots:
            leaf = self._leaves[slot.leaf]
            if slot.parameter.dtype != torch.float32:
                slot.parameter.copy_(slot.view(leaf))

    def discard(self) -> None:
        """Forget the gradients."""
        for leaf in self._leaves:
            leaf.grad = None
        if self.settings.flat:
            for grad in self._grads:
                grad.zero_()
            return
        for slot in self._slots:
            slot.parameter.grad = None

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU, by parameter name: `<name>.value`, `.exp_avg` and `.exp_avg_sq`.

        `value` is the float32 master. The layout in memory does not show. What the adapter's hook
        remembers has keys that begin with `hook/`.
        """
        out = {}
        for slot in self._slots:
            leaf = self._leaves[slot.leaf]
            out[f"{slot.name}.value"] = slot.view(leaf).cpu().clone()
            for moment in _MOMENTS:
                out[f"{slot.name}.{moment}"] = (
                    slot.view(self.adamw.state[leaf][moment]).cpu().clone()
                )
        if self.settings.hook is not None:
            for name, tensor in self.settings.hook.state().items():
                out[_HOOK + name] = tensor.detach().cpu().clone()
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], steps: int, earlier: int = 0) -> None:
        """Continue after `steps` steps, and `earlier` ones of another run, from what `state` said.

        Raises:
            CheckpointCorrupt: another set of parameters, or another shape.
        """
        self._check(state)
        for slot in self._slots:
            leaf = self._leaves[slot.leaf]
            slot.view(leaf).copy_(state[f"{slot.name}.value"])
            for moment in _MOMENTS:
                slot.view(self.adamw.state[leaf][moment]).copy_(state[f"{slot.name}.{moment}"])
            self.adamw.state[leaf]["step"].fill_(steps + earlier)
        self._publish()
        self._steps = steps
        if self.settings.hook is not None:
            cut = len(_HOOK)
            kept = {name[cut:]: value for name, value in state.items() if name.startswith(_HOOK)}
            self.settings.hook.load(kept)

    def _check(self, state: Mapping[str, Tensor]) -> None:
        wanted = {
            f"{slot.name}.{part}": slot.parameter.shape
            for slot in self._slots
            for part in ("value", *_MOMENTS)
        }
        found = {name: t.shape for name, t in state.items() if not name.startswith(_HOOK)}
        if wanted != found:
            raise CheckpointCorrupt(
                "the checkpoint's trained parameters are not those of this run",
                hint="resume with the adapter settings that the checkpoint was made with",
            )


def alike(
    trained: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings
) -> dict[tuple[bool, float], list[tuple[str, nn.Parameter]]]:
    """Parameters by what they are updated with: whether they are vectors, and their rate."""
    found: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trained:
        key = (parameter.ndim < 2, settings.rate_of(name))
        found.setdefault(key, []).append((name, parameter))
    return dict(sorted(found.items()))


def _clip(
    leaves: list[nn.Parameter], max_norm: float, total: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Scale the gradients to `max_norm` at most (0: leave them); returns the norm before."""
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if total is not None:
        norm = total(norm)
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
    return norm
