"""Simple preference optimization: mean log-probabilities as rewards, a margin, no reference.

With m the mean log-probability of a reply's tokens:

    loss = -log sigmoid(beta (m(w) - m(l)) - gamma)

and, with `cpo_alpha` (CPO-SimPO), that much of the preferred replies' negative log-likelihood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.methods import _preference
from tunery.methods._dpo_losses import smoothed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective


class SimpoConfig(Hyperparameters):
    n_epochs: float = Field(1, gt=0, le=100, description="Passes over the training file.")
    learning_rate: float = Field(1e-5, gt=0, le=10, description="Peak learning rate of AdamW.")
    beta: float = Field(
        2.0, gt=0, le=100, description="Scale of the rewards, mean log-probabilities of tokens."
    )
    simpo_gamma: float = Field(
        1.0, ge=0, le=100, description="Margin by which the preferred reply's reward should win."
    )
    cpo_alpha: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of the preferred replies' mean negative log-likelihood beside it.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs taken to be labelled the wrong way round."
    )
    disable_dropout: bool = Field(
        True, description="Turn all dropout off, so that both replies are scored by one model."
    )


class Simpo:
    name: ClassVar[str] = "simpo"
    title: ClassVar[str] = "SimPO"
    summary: ClassVar[str] = "Learns from pairs by mean log-probabilities, without a reference."
    paper: ClassVar[str | None] = (
        "Meng et al.: SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024, "
        "arXiv 2405.14734"
    )
    Config: ClassVar[type[EntryConfig]] = SimpoConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"preference"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"text-generation"})
    learning_rate_factor: ClassVar[float] = 0.05
    example: ClassVar[Mapping[str, Any]] = {
        "type": "simpo",
        "simpo": {"hyperparameters": {"beta": 2.0, "simpo_gamma": 1.0}},
    }
    example_row: ClassVar[Mapping[str, Any]] = _preference.EXAMPLE_ROW

    def objective(self, config: SimpoConfig, run: MethodRun) -> Objective:
        """The loss of pairs, and the likelihood if it is asked for."""
        return _Margins(config, run)


ENTRY: type[Method] = Simpo


def simpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each of B pairs, in nats, of mean log-probabilities: float32 (B,)."""
    return smoothed(beta * (chosen_B - rejected_B) - gamma, label_smoothing)


class _Margins:
    def __init__(self, config: SimpoConfig, run: MethodRun) -> None:
        self._config = config
        self._run = run
        self._step = (1, 1)
        """Pairs, and tokens of preferred replies, of the whole step."""

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
        """Count what the likelihood of preferred replies is a mean over."""
        if self._config.cpo_alpha:
            self._step = _preference.chosen_tokens(examples)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's pairs, and TRL's names for the rewards and their margins."""
        from tunery.training.types import LossOutput

        config = self._config
        tokens = self._run.token_losses(model, batch)
        chosen, rejected = _preference.mean_logps(tokens.nll, batch).unbind(1)
        whole = _preference.whole(batch)
        losses = simpo_loss(
            chosen,
            rejected,
            beta=config.beta,
            gamma=config.simpo_gamma,
            label_smoothing=config.label_smoothing,
        )
        loss = (losses * whole).sum()
        sums = _preference.pair_sums(
            whole, chosen, rejected, config.beta, chosen=chosen, rejected=rejected
        )
        if config.cpo_alpha:
            chosen_S = _preference.of_chosen(batch)
            nll_S = tokens.nll * chosen_S
            pairs, count = self._step
            loss = loss + config.cpo_alpha * nll_S.sum() * (pairs / max(count, 1))
            sums["nll_loss"] = (nll_S.detach().sum(), chosen_S.sum())
        return LossOutput(loss=loss, sums=sums)
