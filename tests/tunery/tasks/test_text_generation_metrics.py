"""Which metrics a loss can carry."""

import math

import pytest

from tunery.tasks.text_generation import Runtime
from tunery.training.types import Evaluated

NAMES = ["loss", "perplexity", "token_accuracy"]


def test_a_likelihood_has_a_perplexity() -> None:
    values = Runtime().metrics(NAMES, Evaluated(math.log(4), {"mean_token_accuracy": 0.5}))
    assert values == {
        "loss": math.log(4),
        "perplexity": pytest.approx(4.0),
        "token_accuracy": 0.5,
    }


def test_a_preference_loss_has_none() -> None:
    assert Runtime().metrics(NAMES, Evaluated(0.69, {"rewards/margins": 0.1})) == {"loss": 0.69}
