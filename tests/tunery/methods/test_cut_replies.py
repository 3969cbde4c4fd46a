"""Replies that max_length cuts off whole teach nothing, and harm nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from tunery import catalogue
from tunery.tasks import reward_modeling, text_generation
from tunery.training.losses import TokenLossComputer
from tunery.training.types import IGNORE, Document, Example, MethodRun

SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid", "ipo", "sft"]},
    "kto": {},
    "orpo": {},
    "simpo": {"cpo_alpha": 0.5},
    "reward": {"center_rewards_coefficient": 0.1},
}


def document(length: int, learnt: int, seed: int) -> Document:
    ids = np.random.default_rng(seed).integers(0, 200, length).astype(np.int32)
    return Document(ids, np.where(np.arange(length) < length - learnt, np.int32(IGNORE), ids))


PAIRS = [
    Example((document(9, 4, 1), document(7, 2, 2)), None, 0),
    Example((document(6, 3, 3), document(8, 4, 4)), None, 1),
]
CUT = [
    Example((document(9, 4, 5), document(9, 0, 6)), None, 2),
    Example((document(9, 0, 7), document(9, 0, 8)), None, 3),
]


def step(method: str, model: Any, task: Any, rows: list[Example]) -> tuple[Any, Any, Any]:
    """Mean loss, metrics and gradient."""
    entry = catalogue.find("methods", method)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    losses: Any = TokenLossComputer(base) if method != "reward" else None
    reference = getattr(model, "disable_adapter", None)
    run = MethodRun(task, losses, reference, 0, losses_of=TokenLossComputer)
    objective: Any = entry.objective(entry.Config(**SETTINGS[method]), run)
    objective.prepare(model, [])
    if hasattr(objective, "begin"):
        objective.begin(iter(rows))
    if hasattr(objective, "questions"):
        asked = task.collate(objective.questions(iter(rows)), layout="rows", pad_id=0)
        objective.told(objective.answers(model, asked).tolist())
    out = objective.loss(model, task.collate(rows, layout="rows", pad_id=0))
    loss = out.loss / sum(objective.units(example) for example in rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
    means = {name: (total / count).item() for name, (total, count) in out.sums.items()}
    return loss.item(), means, gradient


@pytest.mark.parametrize("method", [name for name in SETTINGS if name != "kto"])
def test_a_pair_without_a_reply_changes_nothing(
    method: str, make_policy: Any, base_folder: Any
) -> None:
    if method == "reward":
        task: Any = reward_modeling.Runtime()
        torch.manual_seed(0)
        model = task.load_model(base_folder, dtype=torch.float32, labels=None)
    else:
        task, model = text_generation.Runtime(), make_policy()
    alone, among = step(method, model, task, PAIRS), step(method, model, task, [*PAIRS, *CUT])
    assert among[0] == pytest.approx(alone[0], abs=1e-6)
    assert among[1] == pytest.approx(alone[1], abs=1e-5)
    torch.testing.assert_close(among[2], alone[2], rtol=1e-4, atol=1e-6)
    assert among[2].isfinite().all()


def test_a_reply_that_is_cut_off_changes_nothing_in_kto(make_policy: Any) -> None:
    model, task = make_policy(), text_generation.Runtime()
    rows = [
        Example((d,), i % 2, i) for i, d in enumerate((*PAIRS[0].documents, *PAIRS[1].documents))
    ]
    cut = Example(CUT[1].documents[:1], 1, 9)
    alone, among = step("kto", model, task, rows), step("kto", model, task, [*rows, cut])
    assert among[0] == pytest.approx(alone[0], abs=1e-6)
    assert among[1] == pytest.approx(alone[1], abs=1e-5)
    torch.testing.assert_close(among[2], alone[2], rtol=1e-4, atol=1e-6)
