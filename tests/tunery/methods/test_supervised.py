"""Supervised training's options: noise by transformers' formula, smoothing, weights of messages."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother

from tunery import catalogue
from tunery.errors import UnsupportedCombination
from tunery.methods._neftune import noise, noisy_embeddings
from tunery.methods.supervised import Supervised, SupervisedConfig
from tunery.tasks.text_generation import Runtime
from tunery.training.collate import collate
from tunery.training.losses import TokenLossComputer
from tunery.training.types import (
    DISCOUNTS,
    IGNORE,
    AdapterRun,
    Batch,
    Document,
    Example,
    Layout,
    MethodRun,
)

WIDTH = 16


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    base = LlamaForCausalLM(config)
    entry = catalogue.find("adapters", "lora")
    run = AdapterRun(base, "CAUSAL_LM", None, 0, "example/base")  # type: ignore[arg-type]
    return entry.apply(entry.Config(), run)


def example(length: int, learnt: int, *, index: int = 0, discount: float = 0.0) -> Example:
    ids = (np.arange(length, dtype=np.int32) * 7 + index) % 50
    labels = np.where(np.arange(length) < length - learnt, np.int32(IGNORE), ids)
    tracks = {DISCOUNTS: np.full(length, discount, np.float32)} if discount else {}
    return Example((Document(ids, labels, tracks=tracks),), None, index)


def batch(*examples: Example, layout: Layout = "rows") -> Batch:
    return collate(examples, layout=layout, pad_id=0)


def loss(tuned: Any, given: Batch, **settings: Any) -> torch.Tensor:
    run = MethodRun(Runtime(), TokenLossComputer(tuned.get_base_model()), None, 0)
    return Supervised().objective(SupervisedConfig(**settings), run).loss(tuned, given).loss


def test_noise_is_that_of_transformers() -> None:
    embeddings = torch.nn.Embedding(50, WIDTH)
    embeddings.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    given = batch(example(9, 4), example(9, 3, index=1))
    plain = embeddings(given.input_ids)
    torch.manual_seed(4)
    theirs = neftune_post_forward_hook(embeddings, None, plain)
    torch.manual_seed(4)
    torch.testing.assert_close(plain + noise(plain, given, 5.0), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_noise_follows_each_documents_own_length(layout: Layout) -> None:
    lengths = (4, 400)
    given = batch(*(example(n, 2, index=i) for i, n in enumerate(lengths)), layout=layout)
    drawn = noise(torch.zeros(*given.input_ids.shape, WIDTH), given, 3.0).abs()
    by_document = [drawn[0, :4], drawn[1]] if layout == "rows" else [drawn[0, :4], drawn[0, 4:]]
    for length, part in zip(lengths, by_document, strict=True):
        most = 3.0 / (length * WIDTH) ** 0.5
        assert 0.8 * most < part.max().item() <= most


def test_noise_is_for_training_and_leaves_no_trace() -> None:
    tuned, given = model(), batch(example(9, 4))
    tuned.eval()
    plain = loss(tuned, given).item()
    assert loss(tuned, given, neftune_noise_alpha=100).item() == plain
    tuned.train()
    assert loss(tuned, given, neftune_noise_alpha=100).item() != pytest.approx(plain, abs=1e-3)
    assert loss(tuned, given).item() == pytest.approx(plain, abs=1e-6)


def test_noise_ends_with_an_error_too() -> None:
    tuned, given = model(), batch(example(9, 4))
    with pytest.raises(RuntimeError, match="stop"), noisy_embeddings(tuned, given, 5.0):
        raise RuntimeError("stop")
    assert not tuned.get_base_model().get_input_embeddings()._forward_hooks


def test_smoothing_is_that_of_transformers_and_for_training_alone() -> None:
    tuned, given = model(), batch(example(9, 4), example(6, 2, index=1))
    labels = torch.full(given.input_ids.shape, IGNORE).flatten()
    labels[given.target_positions + 1] = given.target_ids
    out = tuned(input_ids=given.input_ids)
    by_smoother = LabelSmoother(epsilon=0.1)(
        out, labels.view_as(given.input_ids), shift_labels=True
    )
    tuned.train()
    smoothed = loss(tuned, given, label_smoothing_factor=0.1) / given.supervised
    assert smoothed.item() == pytest.approx(by_smoother.item(), abs=1e-5)
    tuned.eval()
    plain = loss(tuned, given, label_smoothing_factor=0.1)
    assert plain.item() == loss(tuned, given).item()
    assert plain.item() / given.supervised != pytest.approx(by_smoother.item(), abs=1e-3)


def test_a_message_of_half_weight_counts_half_in_loss_and_units() -> None:
    tuned = model().eval()
    whole, half = example(9, 4), example(6, 2, index=1, discount=0.5)
    apart = loss(tuned, batch(whole)) + 0.5 * loss(tuned, batch(example(6, 2, index=1)))
    torch.testing.assert_close(loss(tuned, batch(whole, half)), apart)
    units = Runtime().units
    assert (units(whole), units(half)) == (4.0, 1.0)


def test_a_task_that_cannot_smooth_is_refused() -> None:
    task: Any = type("Hard", (), {})()
    run = MethodRun(task, TokenLossComputer(model().get_base_model()), None, 0)
    Supervised().objective(SupervisedConfig(), run)
    with pytest.raises(UnsupportedCombination, match="label_smoothing_factor"):
        Supervised().objective(SupervisedConfig(label_smoothing_factor=0.1), run)


@pytest.mark.parametrize(
    "settings",
    [{"neftune_noise_alpha": 0}, {"label_smoothing_factor": 1}, {"label_smoothing_factor": -0.1}],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SupervisedConfig(**settings)
