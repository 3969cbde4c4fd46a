"""How the ranks of a run share it, and whether activations are recomputed: by what a device holds.

One device trains alone. Several hold the model each where it fits, because that sends least between
them (ddp); where it does not, they divide it (fsdp, or deepspeed_zero3 for an adapter that cannot
be divided so). Within a strategy a smaller micro-batch comes first, as long as it keeps a GPU busy,
and recomputing last, because it costs a forward pass more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.entries import InCache, Loads
from tunery.errors import UnsupportedCombination
from tunery.spec import Compute, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tunery.entries import Adapter, EntryConfig, ModelShape
    from tunery.request import ComputeRequest
    from tunery.resolve import DeviceFacts
    from tunery.spec import Offload

OFFLOADS: dict[Strategy, frozenset[Offload]] = {
    "fsdp": frozenset({"parameters"}),
    "deepspeed_zero2": frozenset({"optimizer"}),
    "deepspeed_zero3": frozenset({"optimizer", "parameters"}),
}
"""What each strategy can leave in the host's memory, the better strategies first."""

DIVIDES: dict[Strategy, frozenset[str]] = {
    "fsdp": frozenset({"values", "gradients", "optimizer"}),
    "deepspeed_zero1": frozenset({"optimizer"}),
    "deepspeed_zero2": frozenset({"gradients", "optimizer"}),
    "deepspeed_zero3": frozenset({"values", "gradients", "optimizer"}),
}
"""What each strategy divides among ranks; the others divide nothing."""

ROOM = 0.9
"""Share of a device's memory that a run may plan with. The rest goes to the CUDA context, to
buffers of communication and to what the allocator cannot use."""
_TRAINED_BYTES = 16
"""Of a trained number: value, gradient, float32 master where the value is in half precision, and
AdamW's two moments."""
_LOGITS_BYTES = 2 << 30
"""Above this the head works in tiles (`tunery.training.losses.HeadPolicy`)."""
_BUDGETS = (16_384, 8_192, 4_096)
"""Tokens of a micro-batch; with fewer, a GPU waits for the next kernel of a small model."""
_CPU_BUDGET = 4_096


@dataclass(frozen=True, slots=True)
class Load:
    """What decides how much memory a run takes, beside how ranks share it.

    Attributes:
        trainable: trained numbers.
        base_bytes: that a frozen weight takes; None: as many as the precision says.
        longest: tokens that an example may have.
    """

    shape: ModelShape
    trainable: int
    base_bytes: float | None = None
    longest: int = 0


def load_of(
    adapter: Adapter, config: EntryConfig, shape: ModelShape | None, longest: int
) -> Load | None:
    """None while the base model's size is not known."""
    if shape is None or not shape.parameters:
        return None
    base = adapter.weight_bytes(config) if isinstance(adapter, Loads) else None
    return Load(shape, adapter.trainable_parameters(config, shape), base, longest)


def memory_needed(load: Load, compute: Compute) -> int:
    """Bytes that one rank's device needs, modelled.

    Activations that are kept are 8 H + 4 I numbers per token and layer (H hidden, I intermediate
    size); recomputed, H per token and layer and those of one layer. Divided weights are whole for
    two blocks at a time, and for the embeddings and the head.
    """
    shape, world = load.shape, compute.gpus * compute.nodes
    width = 2 if compute.precision == "bf16" else 4
    whole = load.trainable >= shape.parameters
    base = 0.0 if whole else shape.parameters * (load.base_bytes or width)
    parts = {
        "values": base + load.trainable * width,
        "gradients": float(load.trainable * width),
        "optimizer": float(load.trainable * (_TRAINED_BYTES - 2 * width)),
    }
    divided = DIVIDES.get(compute.strategy, frozenset())
    total = 0.0
    for part, size in parts.items():
        if not _on_host(part, compute):
            total += size / world if part in divided else size
    if "values" in divided:
        total += min(parts["values"], _gathered(shape, width))
    return int(total) + _activations(load, compute, width)


def _on_host(part: str, compute: Compute) -> bool:
    if compute.offload == "parameters":
        return part != "gradients" or compute.strategy == "fsdp"
    return compute.offload == "optimizer" and part == "optimizer"


def _gathered(shape: ModelShape, width: int) -> float:
    """Bytes of the weights that are whole at once though they are divided."""
    tables = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    blocks = max(0, shape.parameters - tables)
    return width * (min(tables, shape.parameters) + 2 * blocks / max(1, shape.num_hidden_layers))


def _activations(load: Load, compute: Compute, width: int) -> int:
    shape = load.shape
    tokens = max(compute.micro_batch_tokens, load.longest)
    layer = 8 * shape.hidden_size + 4 * shape.intermediate_size
    if compute.gradient_checkpointing:
        numbers = shape.num_hidden_layers * shape.hidden_size + layer
    else:
        numbers = shape.num_hidden_layers * layer
    return tokens * numbers * width + min(tokens * shape.vocab_size * 4, _LOGITS_BYTES)


def place(
    asked: ComputeRequest,
    adapter: Adapter,
    load: Load | None,
    facts: DeviceFacts | None,
    *,
    note: Callable[[str, str], None],
    warn: Callable[[str, str, str], None],
) -> Compute:
    """Settle what the request left open: the first way that fits, or the one that needs least.

    Args:
        load: None while the base model's size is not known.
        facts: None when no device is there to ask.
        note: called with the path in the spec and the reason of each value chosen here.
        warn: called with code, path and message.

    Raises:
        UnsupportedCombination: the strategy asked for cannot do what else is asked for.
    """
    _refuse(asked)
    kind = facts.kind if facts else "auto"
    options = list(_options(asked, adapter, facts))
    room = None if facts is None or kind == "cpu" else facts.memory_bytes
    if load is None or room is None:
        chosen, needs = options[0], None
    else:
        needs = [memory_needed(load, option) for option in options]
        fitting = [o for o, need in zip(options, needs, strict=True) if need <= ROOM * room]
        chosen = fitting[0] if fitting else options[needs.index(min(needs))]
    told = _Told(asked, options, needs, room, chosen)
    if asked.precision == "auto":
        note("compute.precision", f"auto: {kind} device")
    if asked.micro_batch_tokens == "auto":
        note("compute.micro_batch_tokens", told.budget(kind))
    if asked.strategy == "auto":
        note("compute.strategy", told.strategy())
    if asked.gradient_checkpointing == "auto":
        note("compute.gradient_checkpointing", told.recomputing())
    if needs is not None and room is not None and told.need > ROOM * room:
        warn(
            "may_not_fit",
            "ext.compute",
            f"about {_gb(told.need)} are needed on each device, which has {_gb(room)}",
        )
    return chosen


def _refuse(asked: ComputeRequest) -> None:
    world = asked.gpus * asked.nodes
    if asked.strategy == "single" and world > 1:
        raise UnsupportedCombination(
            f"strategy 'single' trains on one device and {world} are asked for",
            hint="use ddp, fsdp, deepspeed_zero2, deepspeed_zero3 or auto",
            param="ext.compute.strategy",
        )
    if asked.strategy == "auto" or asked.offload == "none":
        return
    if asked.offload not in OFFLOADS.get(asked.strategy, frozenset()):
        able = [name for name, kinds in OFFLOADS.items() if asked.offload in kinds]
        raise UnsupportedCombination(
            f"strategy {asked.strategy!r} cannot leave {asked.offload} in the host's memory",
            hint=f"{asked.offload}: {', '.join(able)}",
            param="ext.compute.offload",
        )


def _options(
    asked: ComputeRequest, adapter: Adapter, facts: DeviceFacts | None
) -> Iterator[Compute]:
    """All ways that the request leaves open, the preferred ones first."""
    kind = facts.kind if facts else "auto"
    precision = asked.precision
    if precision == "auto":
        precision = "bf16" if facts and facts.bf16 else "fp32"
    recompute = (
        [asked.gradient_checkpointing] if asked.gradient_checkpointing != "auto" else [False]
    )
    if asked.gradient_checkpointing == "auto" and not isinstance(adapter, InCache):
        recompute.append(True)
    budgets: Sequence[int] = _BUDGETS if kind == "cuda" else (_CPU_BUDGET,)
    if asked.micro_batch_tokens != "auto":
        budgets = (asked.micro_batch_tokens,)
    for strategy, again, budget in itertools.product(
        _strategies(asked, adapter), recompute, budgets
    ):
        yield Compute(
            gpus=asked.gpus,
            nodes=asked.nodes,
            strategy=strategy,
            offload=asked.offload,
            precision=precision,
            device=facts.kind if facts else "auto",
            gradient_checkpointing=again is True,
            micro_batch_tokens=budget,
        )


def _strategies(asked: ComputeRequest, adapter: Adapter) -> list[Strategy]:
    """Raises:
    UnsupportedCombination: the adapter trains under none that could offload.
    """
    if asked.strategy != "auto":
        return [asked.strategy]

    def able(names: Sequence[Strategy]) -> list[Strategy]:
        return [n for n in names if adapter.strategies is None or n in adapter.strategies]

    if asked.offload != "none":
        found = able([name for name, kinds in OFFLOADS.items() if asked.offload in kinds])
        if not found:
            raise UnsupportedCombination(
                f"adapter {adapter.name!r} trains under no strategy that can leave "
                f"{asked.offload} in the host's memory",
                param="ext.compute.offload",
            )
        return found
    if asked.gpus * asked.nodes == 1:
        return ["single"]
    return ["ddp", *able(["fsdp", "deepspeed_zero3"])[:1]]


@dataclass(frozen=True, slots=True)
class _Told:
    """Why, in words with numbers."""

    asked: ComputeRequest
    options: Sequence[Compute]
    needs: Sequence[int] | None
    room: int | None
    chosen: Compute

    @property
    def need(self) -> int:
        return self._need_of(self.chosen)

    def _need_of(self, option: Compute) -> int:
        return self.needs[self.options.index(option)] if self.needs else 0

    def strategy(self) -> str:
        world = self.asked.gpus * self.asked.nodes
        ranks = f"auto: {world} rank{'s' if world > 1 else ''}"
        if self.asked.offload != "none":
            return f"{ranks}, {self.asked.offload} in the host's memory"
        if self.needs is None or self.room is None:
            return ranks
        first = self.options[0].strategy
        if self.chosen.strategy == first:
            return f"{ranks}, {_gb(self.need)} of {_gb(self.room)}"
        whole = min(self._need_of(o) for o in self.options if o.strategy == first)
        return (
            f"{ranks}, {_gb(whole)} of {_gb(self.room)} with the whole model on each, "
            f"{_gb(self.need)} with parts"
        )

    def recomputing(self) -> str:
        if self.needs is None or self.room is None:
            return "auto: off while nothing says that memory is short"
        if not self.chosen.gradient_checkpointing:
            return f"auto: {_gb(self.need)} of {_gb(self.room)} without"
        same = [
            self._need_of(option)
            for option in self.options
            if option.strategy == self.chosen.strategy and not option.gradient_checkpointing
        ]
        return f"auto: {_gb(min(same))} of {_gb(self.room)} without, {_gb(self.need)} with"

    def budget(self, kind: str) -> str:
        if self.needs is None or self.room is None:
            return f"auto: {kind} device"
        return f"auto: {kind} device, {_gb(self.need)} of {_gb(self.room)}"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
