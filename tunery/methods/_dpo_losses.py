"""The losses of the DPO family, each of one pair, by their names in TRL.

In all of them c and r are the log-probability ratios of the preferred and the other reply between
the trained and the untrained model, and d = c - r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DISCOPOP_TAU = 0.05


@dataclass(frozen=True, slots=True)
class Ratios:
    """Of B pairs; all (B,), float32.

    Attributes:
        chosen, rejected: log p - log p_ref of the replies, in nats.
        chosen_tokens, rejected_tokens: the replies' lengths.
        beta: inverse temperature.
        smoothing: share of pairs taken to be labelled the wrong way round.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float
    smoothing: float

    @property
    def margin(self) -> Tensor:
        """beta d."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def margin_per_token(self) -> Tensor:
        """d, each reply's part divided by its length."""
        return self.chosen / self.chosen_tokens.clamp(min=1) - (
            self.rejected / self.rejected_tokens.clamp(min=1)
        )


def _no(x: Tensor) -> Tensor:
    """-log sigmoid(x): what it costs to doubt x."""
    from torch.nn import functional

    return -functional.logsigmoid(x)


def smoothed(margin_B: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of each margin, (B,), where that share of the pairs is the wrong way round."""
    loss_B = _no(margin_B)
    return loss_B if not smoothing else (1 - smoothing) * loss_B + smoothing * _no(-margin_B)


def sigmoid(r: Ratios) -> Tensor:
    """Rafailov et al. 2023, eq. 7; with smoothing, Mitchell's conservative DPO."""
    return smoothed(r.margin, r.smoothing)


def hinge(r: Ratios) -> Tensor:
    """Zhao et al. 2023 (SLiC, arXiv 2305.10425), on DPO's rewards."""
    return (1 - r.margin).relu()


def ipo(r: Ratios) -> Tensor:
    """Azar et al. 2023 (arXiv 2310.12036), eq. 17, with ratios per token as its authors advise."""
    loss: Tensor = (r.margin_per_token - 1 / (2 * r.beta)) ** 2
    return loss


def robust(r: Ratios) -> Tensor:
    """Chowdhury et al. 2024 (arXiv 2403.00409), eq. 12: unbiased under flipped labels."""
    e = r.smoothing
    return ((1 - e) * _no(r.margin) - e * _no(-r.margin)) / (1 - 2 * e)


def exo_pair(r: Ratios) -> Tensor:
    """Ji et al. 2024 (arXiv 2402.00856), eq. 16: reverse KL to the smoothed labels."""
    likes, other = _no(r.margin), _no(-r.margin)
    return (-likes).exp() * (-likes - math.log1p(-r.smoothing)) + (-other).exp() * (
        -other - math.log(r.smoothing)
    )


def nca_pair(r: Ratios) -> Tensor:
    """Chen et al. 2024 (arXiv 2402.05369): keeps the preferred reply likely in itself."""
    c, j = r.beta * r.chosen, r.beta * r.rejected
    return _no(c) + 0.5 * _no(-c) + 0.5 * _no(-j)


def bco_pair(r: Ratios) -> Tensor:
    """Jung et al. 2024 (arXiv 2404.04656) without the shift: a classifier of replies."""
    return _no(r.beta * r.chosen) + _no(-r.beta * r.rejected)


def sppo_hard(r: Ratios) -> Tensor:
    """Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with wins of probability 1."""
    loss: Tensor = (r.chosen - 0.5 / r.beta) ** 2 + (r.rejected + 0.5 / r.beta) ** 2
    return loss


def apo_zero(r: Ratios) -> Tensor:
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7: preferred replies up, others down."""
    return 1 - (r.beta * r.chosen).sigmoid() + (r.beta * r.rejected).sigmoid()


def apo_down(r: Ratios) -> Tensor:
    """The same, eq. 8: both down, the other one more."""
    return (r.beta * r.chosen).sigmoid() + 1 - r.margin.sigmoid()


def discopop(r: Ratios) -> Tensor:
    """Lu et al. 2024 (arXiv 2406.08414), eq. 5, at temperature 0.05."""
    share = (r.margin / DISCOPOP_TAU).sigmoid()
    return _no(r.margin) * (1 - share) + (-r.margin).exp() * share


def sigmoid_norm(r: Ratios) -> Tensor:
    """`sigmoid` with ratios per token."""
    return _no(r.beta * r.margin_per_token)


LOSSES: dict[str, Callable[[Ratios], Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        hinge,
        ipo,
        robust,
        exo_pair,
        nca_pair,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        discopop,
        sigmoid_norm,
    )
}
