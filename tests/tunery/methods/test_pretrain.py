"""Continued pre-training: every token of every text, in examples of one length."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tunery.methods.pretrain import PretrainConfig
from tunery.request import parse_request
from tunery.resolve import resolve
from tunery.spec import DataFile
from tunery.training.store import TokenStore

TEXTS = [{"text": "abcdefgh " * (1 + i % 5)} for i in range(12)]
TOKENS = sum(len(row["text"]) + 1 for row in TEXTS)  # a stop token each


def stores(folder: Any) -> list[TokenStore]:
    return [TokenStore(found.parent) for found in sorted(folder.glob("tokens/*/indices.npy"))]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_all_text_is_learnt_however_long_its_rows(
    strategy: str, make_order: Any, train: Any, series: Any, tmp_path: Any
) -> None:
    config = {"packing_strategy": strategy, "max_length": 16, "n_epochs": 3}
    events = train(make_order("pretrain", TEXTS, config))
    (store,) = stores(tmp_path / "run")
    assert store.total_tokens == TOKENS
    assert store.tokens.max() == 16
    documents = int(store.documents.sum())
    assert int(store.supervised.sum()) == TOKENS - documents  # a first token has nothing before it
    if strategy == "wrapped":
        assert store.documents.tolist() == [1] * len(store)
    else:
        assert store.documents.max() > 1
    start = next(event for event in events if event.kind == "start")
    assert start.features["preflight"]["findings"] == []
    assert start.total_steps == 3 * -(-len(store) // 4)
    losses = series(events, "train_loss")
    assert losses[-1] < losses[0] - 0.1


def test_texts_of_a_stream_are_parted_by_the_stop_token(
    make_order: Any, train: Any, tokenizer: Any, tmp_path: Any
) -> None:
    train(make_order("pretrain", TEXTS, {"max_length": 64, "max_steps": 1}))
    (store,) = stores(tmp_path / "run")
    stream = np.concatenate([store[i].documents[0].input_ids for i in range(len(store))])
    assert tokenizer.decode(stream) == "".join(row["text"] + "<eos>" for row in TEXTS)


def test_pieces_that_share_an_example_do_not_see_each_other(make_base: Any) -> None:
    from tunery.tasks.text_generation import Runtime
    from tunery.training.blocks import fitted
    from tunery.training.losses import TokenLossComputer
    from tunery.training.types import Document, Example

    ids = [np.arange(5 * row, 5 * row + n, dtype=np.int32) for row, n in enumerate((4, 3, 6))]
    rows = [Example((Document(i, i),), None, row) for row, i in enumerate(ids)]
    model = make_base().eval()
    compute = TokenLossComputer(model)

    def total(examples: Any) -> float:
        batch = Runtime().collate(examples, layout="rows", pad_id=0)
        with torch.no_grad():
            return compute(model, batch).nll.sum().item()

    assert total(list(fitted(rows, 16))) == pytest.approx(sum(total([r]) for r in rows), abs=1e-4)


def test_the_held_out_loss_is_over_whole_texts_too(
    make_order: Any, train: Any, series: Any
) -> None:
    config = {"max_length": 16, "max_steps": 2}
    events = train(make_order("pretrain", TEXTS, config, valid=TEXTS[:3]))
    assert len(series(events, "valid_loss")) == 2


def test_another_grouping_is_another_cache_entry(
    make_order: Any, train: Any, tmp_path: Any
) -> None:
    cache = tmp_path / "cache"
    for number, strategy in enumerate(("wrapped", "bfd_split", "wrapped")):
        config = {"packing_strategy": strategy, "max_length": 16, "max_steps": 1}
        order = make_order("pretrain", TEXTS, config, cache_dir=str(cache))
        train(order, f"run-{number}")
    assert len(list(cache.iterdir())) == 2


def test_a_request_counts_examples_and_not_rows() -> None:
    # One row of 400 kB is about 100,000 tokens, 98 examples of 1024 and 13 steps of 8.
    file = DataFile(file_id="file-1", sha256="0", format="text", rows=1, size_bytes=400_000)
    settings = {"max_length": 1024}
    request = parse_request(
        {
            "model": "base",
            "training_file": "file-1",
            "method": {"type": "pretrain", "pretrain": {"hyperparameters": settings}},
        }
    )
    resolved = resolve(request, training=file, seed=1)
    assert resolved.spec.method.config["batch_size"] == 8
    assert resolved.sources["method.config.batch_size"] == "auto: about 98 examples"
    assert resolved.estimate["steps"] == 13
    assert 100_000 <= resolved.estimate["train_tokens"] < 110_000
    assert resolved.warnings == []


@pytest.mark.slow
def test_twenty_steps_of_long_rows_teach_a_storyteller_shakespeare(
    make_order: Any, train: Any, series: Any, shared_dir: Any
) -> None:
    text = (shared_dir / "data/tinyshakespeare/input.txt").read_text()
    rows = [{"text": text[start : start + 40_000]} for start in range(0, 400_000, 40_000)]
    config = {"max_steps": 20, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2}
    order = make_order("pretrain", rows, config, valid=[{"text": text[-8_000:]}])
    stories = str(shared_dir / "models/stories260K")
    losses = series(train(order.model_copy(update={"base_model_path": stories})), "valid_loss")
    assert losses[0] > 4.2
    assert losses[-1] < 3.4


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValidationError):
        PretrainConfig(packing_strategy="bfd")  # type: ignore[arg-type]
