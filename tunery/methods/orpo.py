"""Odds ratio preference optimization: likelihood and preference at once, without a reference.

With p the geometric mean of a reply's token probabilities and odds(p) = p / (1 - p):

    loss = nll(prompt and preferred reply) - beta log sigmoid(log odds(p_w) - log odds(p_l))

The first term is a mean over tokens, the second over pairs. In the paper beta is lambda.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.methods import _preference

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective


class OrpoConfig(Hyperparameters):
    n_epochs: float = Field(1, gt=0, le=100, description="Passes over the training file.")
    learning_rate: float = Field(5e-5, gt=0, le=10, description="Peak learning rate of AdamW.")
    beta: float = Field(
        0.1, gt=0, le=100, description="Weight of the odds ratio beside the likelihood."
    )
    disable_dropout: bool = Field(
        True, description="Turn all dropout off, so that both replies are scored by one model."
    )


class Orpo:
    name: ClassVar[str] = "orpo"
    title: ClassVar[str] = "ORPO"
    summary: ClassVar[str] = "Learns preferred replies and the preference at once, from pairs."
    paper: ClassVar[str | None] = (
        "Hong et al.: ORPO: Monolithic Preference Optimization without Reference Model, 2024, "
        "arXiv 2403.07691"
    )
    Config: ClassVar[type[EntryConfig]] = OrpoConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"preference"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"text-generation"})
    learning_rate_factor: ClassVar[float] = 0.25
    example: ClassVar[Mapping[str, Any]] = {
        "type": "orpo",
        "orpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 1}},
    }
    example_row: ClassVar[Mapping[str, Any]] = _preference.EXAMPLE_ROW

    def objective(self, config: OrpoConfig, run: MethodRun) -> Objective:
        """Both terms from one forward pass."""
        return _Odds(config, run)


ENTRY: type[Method] = Orpo


def log_odds(mean_logp_B: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(x); exact where p is near 0 and near 1, and bounded there."""
    import torch

    mean_logp_B = mean_logp_B.clamp(max=-1e-7)
    likely = mean_logp_B > -math.log(2)
    # Each branch sees harmless numbers where the other one is taken: no NaN in its gradient.
    high = torch.where(likely, mean_logp_B, -1.0)
    low = torch.where(likely, -1.0, mean_logp_B)
    rest = torch.where(likely, (-torch.expm1(high)).log(), torch.log1p(-low.exp()))
    return mean_logp_B - rest


class _Odds:
    scores_prompts = True
    """The likelihood is of the prompt too; the odds, by weight, of the replies alone."""

    def __init__(self, config: OrpoConfig, run: MethodRun) -> None:
        self._config = config
        self._run = run
        self._step = (1, 1)
        """Pairs, and tokens that the likelihood is a mean over, of the whole step."""

    def units(self, example: Example) -> float:
        """One for each pair of two replies: the loss is the mean over them.

        Raises:
            InvalidConfig: the example is not a pair.
        """
        return _preference.pair_units(example)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Turn dropout off; there is no reference."""
        if self._config.disable_dropout:
            _preference.no_dropout(model)

    def begin(self, examples: Iterable[Example]) -> None:
        """Count pairs and tokens."""
        self._step = _preference.chosen_tokens(examples)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's pairs, and TRL's names for what it is made of."""
        from torch.nn import functional

        from tunery.training.types import LossOutput

        tokens = self._run.token_losses(model, batch)
        mean_B2 = _preference.mean_logps(tokens.nll, batch)
        chosen, rejected = mean_B2.unbind(1)
        odds_B = log_odds(chosen) - log_odds(rejected)
        ratio_B = functional.logsigmoid(odds_B)
        whole_B = _preference.whole(batch)
        chosen_S = _preference.of_chosen(batch)
        nll_S = tokens.nll * chosen_S
        pairs, count = self._step
        loss = nll_S.sum() * (pairs / max(count, 1)) - self._config.beta * (ratio_B * whole_B).sum()
        sums = _preference.pair_sums(
            whole_B, chosen, rejected, self._config.beta, chosen=chosen, rejected=rejected
        )
        number = whole_B.sum()
        sums |= {
            "nll_loss": (nll_S.detach().sum(), chosen_S.sum()),
            "log_odds_ratio": ((ratio_B.detach() * whole_B).sum(), number),
            "log_odds_chosen": ((odds_B.detach() * whole_B).sum(), number),
        }
        return LossOutput(loss=loss, sums=sums)
