"""Contrastive losses: sentence-transformers' formulas, by hand, and the same however cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.tunery.tasks.conftest import SIZES, Bench, make_tokenizer
from tunery import catalogue
from tunery.errors import InvalidConfig
from tunery.methods.contrastive import ranking_losses, triplet_losses

PAIRS = [
    {"anchor": "where is Bob", "positive": "in the sea", "negatives": []},
    {"anchor": "who lives in Rome", "positive": "Ada lives in the good Rome", "negatives": []},
    {"anchor": "is a dog good", "positive": "the dog is good", "negatives": []},
    {"anchor": "what", "positive": "where", "negatives": []},
]
TRIPLETS = [{**row, "negatives": ["bad " * (i + 1)]} for i, row in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def task(tokenizer: Any) -> Bench:
    return Bench("sentence-embedding", tokenizer)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, pad_token_id=0))


def objective(task: Bench, model: Any, **config: Any) -> Any:
    method = catalogue.find("methods", "contrastive")
    made = method.objective(method.Config(**config), task.run(model))
    made.prepare(model, [])
    return made


def test_ranking_by_hand() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    candidates = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    losses = ranking_losses(anchors, candidates, scale=2.0)
    half = 2 * 0.5**0.5
    expected = [
        -2.0 + torch.tensor([2.0, half, 0.0]).logsumexp(0),
        -half + torch.tensor([0.0, half, 2.0]).logsumexp(0),
    ]
    assert losses.tolist() == pytest.approx([float(value) for value in expected])
    both = ranking_losses(anchors, candidates, scale=2.0, symmetric=True)
    back = -2.0 + torch.tensor([2.0, 0.0]).logsumexp(0)
    assert float(both[0]) == pytest.approx((float(expected[0]) + float(back)) / 2)
    with pytest.raises(ValueError, match="2 anchors and 1 candidates"):
        ranking_losses(anchors, candidates[:1], scale=1.0)


def test_ranking_is_that_of_sentence_transformers() -> None:
    """Its formula: cross entropy over scaled cosines, the diagonal being right."""
    torch.manual_seed(3)
    anchors, positives = torch.randn(2, 5, 8)
    scores = torch.nn.functional.cosine_similarity(anchors[:, None], positives[None], dim=2) * 20
    theirs = torch.nn.functional.cross_entropy(scores, torch.arange(5))
    ours = ranking_losses(anchors, positives, scale=20.0).mean()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


def test_triplets_by_hand() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert triplet_losses(one, other, one, margin=0.5).tolist() == [1.5]
    assert triplet_losses(one, one, other, margin=0.5).tolist() == [0.0]


@pytest.mark.parametrize("rows", [PAIRS, TRIPLETS], ids=["pairs", "triplets"])
@pytest.mark.parametrize("cuts", [[4], [1, 3], [1, 1, 1, 1]])
def test_a_step_has_the_same_gradient_however_it_is_cut(
    task: Bench, model: Any, rows: Any, cuts: list[int]
) -> None:
    examples = task.encode(rows)
    made = objective(task, model, batch_size=4, symmetric=True)
    model.train()
    vectors = model.zero_grad() or task.runtime.embed(model, task.collate(examples))
    by_text = vectors.view(4, -1, vectors.shape[1]).transpose(0, 1)
    losses = ranking_losses(
        by_text[0], by_text[1:].reshape(-1, vectors.shape[1]), scale=20.0, symmetric=True
    )
    losses.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    made.begin(examples)
    total, start = 0.0, 0
    for count in cuts:
        out = made.loss(model, task.collate(examples[start : start + count]))
        out.loss.backward()
        total += float(out.loss.detach())
        start += count
    assert total == pytest.approx(float(losses.sum().detach()), abs=1e-4)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_an_evaluation_tells_rows_apart_in_groups_of_the_batch(task: Bench, model: Any) -> None:
    examples = task.encode(PAIRS)
    made = objective(task, model, batch_size=2)
    model.eval()
    made.begin(examples)
    with torch.no_grad():
        mixed = float(made.loss(model, task.collate([examples[i] for i in (3, 0)])).loss)
        mixed += float(made.loss(model, task.collate([examples[i] for i in (1, 2)])).loss)
        grouped = 0.0
        for group in (examples[:2], examples[2:]):
            made.begin(group)
            out = made.loss(model, task.collate(group))
            assert out.outcomes["vectors"].shape == (2, 2, 32)
            grouped += float(out.loss)
    assert mixed == pytest.approx(grouped, abs=1e-4)


@pytest.mark.parametrize("loss", ["multiple_negatives_ranking", "triplet", "cosine"])
def test_training_learns(task: Bench, model: Any, loss: str) -> None:
    scored = [{"sentence1": r["anchor"], "sentence2": r["positive"], "score": i % 2}
              for i, r in enumerate(PAIRS)]  # fmt: skip
    if loss == "cosine":
        examples = task.encode(scored, format="similarity")
    else:
        examples = task.encode(TRIPLETS)
    made = objective(task, model, loss=loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        if hasattr(made, "begin"):
            made.begin(examples)
        value = made.loss(model.train(), task.collate(examples)).loss
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("loss", "rows", "format"),
    [
        ("triplet", PAIRS, "pairs"),
        ("cosine", PAIRS, "pairs"),
        (
            "multiple_negatives_ranking",
            [{"sentence1": "a", "sentence2": "b", "score": 1.0}],
            "similarity",
        ),
    ],
)
def test_rows_that_a_loss_cannot_learn_from_are_refused(
    task: Bench, model: Any, loss: str, rows: Any, format: str
) -> None:
    (example, *_) = task.encode(rows, format=format)
    with pytest.raises(InvalidConfig) as caught:
        objective(task, model, loss=loss).units(example)
    assert caught.value.param == "method.contrastive.hyperparameters.loss"
