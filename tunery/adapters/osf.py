"""OSF: only the small singular directions of each weight train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.adapters import _peft
from tunery.adapters._tuner import Tuner, TunerConfig
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class OsfConfig(TunerConfig):
    effective_rank: int | float | None = Field(
        None,
        gt=0,
        description="Singular directions kept frozen, as a number or, in 0 to 1, a share of the "
        "shorter side; null: half.",
    )


class Osf(Tuner):
    name: ClassVar[str] = "osf"
    title: ClassVar[str] = "OSF"
    summary: ClassVar[str] = (
        "Trains the weights' minor singular directions and keeps the major ones, against "
        "forgetting."
    )
    paper: ClassVar[str | None] = (
        "Nayak et al.: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual "
        "Learning, 2025, arXiv 2504.07097"
    )
    Config: ClassVar[type[EntryConfig]] = OsfConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "osf", "effective_rank": 0.75}
    default_learning_rate: ClassVar[float] = 2e-5
    peft_config: ClassVar[str] = "OSFConfig"
    transposed: ClassVar[bool] = False
    strategies: ClassVar[frozenset[str] | None] = _peft.UNDIVIDED
    """Each gradient is projected whole."""

    def per_linear(self, config: OsfConfig, linear: Linear) -> int:
        """The singular values and both sides' vectors that are not frozen."""
        shorter = min(linear.inputs, linear.outputs)
        kept = _kept(config.effective_rank, shorter)
        if not 0 < kept < shorter:
            raise InvalidConfig(
                f"effective_rank: {kept} of the {shorter} directions of {linear.name} leave "
                "nothing to train or nothing to keep",
                param="effective_rank",
            )
        return (shorter - kept) * (linear.inputs + linear.outputs + 1)


def _kept(rank: float | None, shorter: int) -> int:
    """Frozen directions of a module: PEFT reads a float up to 1 as a share."""
    if rank is None:
        return shorter // 2
    if isinstance(rank, float) and rank <= 1:
        return int(shorter * rank)
    return min(shorter, int(rank))


ENTRY: type[Adapter] = Osf
