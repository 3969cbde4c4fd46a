from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tunery.errors import CheckpointCorrupt
from tunery.training.optimizer import Optimizer, OptimizerSettings


def settings(**overrides: Any) -> OptimizerSettings:
    values: dict[str, Any] = {
        "learning_rate": 0.05,
        "schedule": "cosine",
        "warmup_steps": 2,
        "total_steps": 8,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        **overrides,
    }
    return OptimizerSettings(**values)


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    model[0].bias.requires_grad_(False)
    return model.to(dtype)


def descend(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> list[float]:
    norms = []
    for step in range(start, start + steps):
        given = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for part in given.to(next(model.parameters()).dtype).split(2):
            model(part).float().square().sum().backward()
        norms.append(float(optimizer.step()))
    return norms


@pytest.mark.parametrize("flat", [True, False])
def test_updates_are_those_of_torch_with_its_own_clipping_and_schedule(flat: bool) -> None:
    from transformers import get_scheduler

    ours, theirs = small(), small()
    norms = descend(ours, Optimizer(ours.named_parameters(), settings(flat=flat)), 6)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.05,
    )
    schedule = get_scheduler("cosine", adamw, num_warmup_steps=2, num_training_steps=8)
    expected = []
    for step in range(6):
        given = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        theirs(given).square().sum().backward()
        expected.append(float(nn.utils.clip_grad_norm_(trained, 0.5)))
        adamw.step()
        schedule.step()
        adamw.zero_grad()
    assert norms == pytest.approx(expected, rel=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_state_continues_in_either_layout(before: bool, after: bool) -> None:
    whole, first, second = small(), small(), small()
    descend(whole, Optimizer(whole.named_parameters(), settings(flat=before)), 5)
    stopped = Optimizer(first.named_parameters(), settings(flat=before))
    descend(first, stopped, 3)
    again = Optimizer(second.named_parameters(), settings(flat=after))
    again.load(stopped.state(), 3)
    descend(second, again, 2, start=3)
    for mine, other in zip(second.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_a_state_of_other_parameters_is_refused() -> None:
    model = small()
    optimizer = Optimizer(model.named_parameters(), settings())
    state = optimizer.state()
    state.pop("0.weight.exp_avg")
    with pytest.raises(CheckpointCorrupt):
        optimizer.load(state, 1)


@pytest.mark.parametrize("flat", [True, False])
def test_small_updates_add_up_in_half_precision(flat: bool) -> None:
    """At 1.0 bfloat16 steps are 1/128; a thousand updates of 1e-5 still have to move it."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    slow = settings(
        learning_rate=1e-5, schedule="constant", weight_decay=0.0, max_grad_norm=0.0, flat=flat
    )
    optimizer = Optimizer(model.named_parameters(), slow)
    for _ in range(1000):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    master = optimizer.state()["weight.value"]
    assert float(master) == pytest.approx(0.99, abs=1e-4)
    assert model.weight.item() == pytest.approx(0.99, abs=1 / 256)


def test_gradients_dropped_leave_nothing_for_the_next_step() -> None:
    kept, dropped = small(), small()
    clean = Optimizer(kept.named_parameters(), settings())
    soiled = Optimizer(dropped.named_parameters(), settings())
    dropped(torch.ones(2, 5)).sum().backward()
    soiled.discard()
    assert descend(kept, clean, 1) == descend(dropped, soiled, 1)


def test_the_rate_follows_the_schedule() -> None:
    optimizer = Optimizer(small().named_parameters(), settings())
    half = 0.05 * 0.5 * (1 + math.cos(math.pi * 0.5))
    rates = [optimizer.learning_rate_at(step) for step in (0, 1, 2, 5, 8)]
    assert rates == pytest.approx([0.0, 0.025, 0.05, half, 0.0])


def test_parameters_stay_views_of_one_buffer() -> None:
    model = small()
    optimizer = Optimizer(model.named_parameters(), settings())
    descend(model, optimizer, 1)
    weights = [model[0].weight, model[2].weight]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert len(optimizer.gradients()) == 2, "matrices and vectors"
