"""Loss, perplexity and token accuracy from sums that add up over batches and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_EXPONENT = 709.0
"""exp(710) overflows a double; a metric has to stay a number that JSON can carry."""


@dataclass(frozen=True)
class TokenTotals:
    """Sums over supervised tokens. `a + b` is the totals of both parts.

    Attributes:
        nll_sum: sum of negative log-likelihoods, in nats, each times its token's weight.
        weight: sum of the tokens' weights; the number of tokens where no weights are used.
        tokens: supervised tokens seen.
        correct: of these, how many were the model's most likely one.
    """

    nll_sum: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    correct: int = 0

    def __add__(self, other: TokenTotals) -> TokenTotals:
        return TokenTotals(
            self.nll_sum + other.nll_sum,
            self.weight + other.weight,
            self.tokens + other.tokens,
            self.correct + other.correct,
        )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per unit of weight, in nats.

        Raises:
            ValueError: there is no supervised token.
        """
        if self.weight <= 0:
            raise ValueError("no supervised tokens to average over")
        return self.nll_sum / self.weight

    @property
    def perplexity(self) -> float:
        """exp(loss), held at exp(709).

        Raises:
            ValueError: there is no supervised token.
        """
        return perplexity(self.loss)

    @property
    def token_accuracy(self) -> float:
        """Share of supervised tokens that were the most likely one, 0..1.

        Raises:
            ValueError: there is no supervised token.
        """
        if not self.tokens:
            raise ValueError("no supervised tokens to score")
        return self.correct / self.tokens


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, held at exp(709); NaN stays NaN."""
    return math.exp(min(loss, MAX_EXPONENT)) if not math.isnan(loss) else loss
