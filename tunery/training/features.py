"""Each optimisation by name: on unless the spec's `compute.without` says otherwise.

What is said in `StartEvent.features` is what happened: an optimisation that is on but does not
apply (the base has no packable attention, say) is recorded as off.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from tunery.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class Switches:
    """None of them changes a loss by more than rounding."""

    packing: bool = True
    """Documents share a row, attention kept apart; on devices where that is faster."""
    length_split: bool = True
    """Rows of like length share a micro-batch."""
    label_compaction: bool = True
    """Unsupervised positions are dropped before the head."""
    chunked_head: bool = True
    """The head runs in tiles when the logits of a micro-batch would not fit."""
    deferred_metrics: bool = True
    """Metrics stay on the device until they are logged."""
    half_adapters: bool = True
    """What trains runs in the base's precision, updated through float32 masters."""
    flat_optimizer: bool = True
    """One buffer for everything that trains."""
    frozen_prefix: bool = True
    """No gradients below the first trained parameter."""
    token_cache: bool = True
    """Tokenised data is kept and found again by its hash."""
    async_checkpoints: bool = True
    """Files are written while training goes on."""
    prefetch: bool = True
    """The next micro-batch is collated and copied meanwhile; on CUDA."""
    memory_probe: bool = True
    """The heaviest micro-batch runs first; on CUDA."""


def switches(without: tuple[str, ...]) -> Switches:
    """All on but these.

    Raises:
        InvalidConfig: there is no optimisation of that name.
    """
    known = {f.name for f in fields(Switches)}
    for name in without:
        if name not in known:
            raise InvalidConfig(
                f"compute.without: no optimisation is called {name!r}",
                hint=f"known: {', '.join(sorted(known))}",
                param="ext.compute.without",
            )
    return Switches(**dict.fromkeys(without, False))
