"""Vectors: pooling, scores of pairs, ranks by hand, and what sentence-transformers finds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tunery.errors import InvalidData
from tunery.training.checkpoint import write_json
from tunery.training.types import Evaluated, Outcome

if TYPE_CHECKING:
    from pathlib import Path

SCORED = [
    {"sentence1": "who is good", "sentence2": "is a dog good", "score": 5.0},
    {"sentence1": "where", "sentence2": "in the sea of Rome", "score": 0.0},
    {"sentence1": "bad", "sentence2": "good", "score": 2.5},
]
PAIRS = [
    {"anchor": "who", "positive": "Bob", "negatives": ["bad"]},
    {"anchor": "where", "positive": "Rome", "negatives": ["good"]},
    {"anchor": "in", "positive": "Bob", "negatives": ["the"]},
]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_vector_is_of_its_own_tokens_alone(
    bench: Any, bases: Any, family: str, pooling: str
) -> None:
    task = bench("sentence-embedding", pooling=pooling, normalize=False)
    model = task.load(bases[family])
    (example,) = task.encode([{"anchor": "who", "positive": "in the sea of Rome", "negatives": []}])
    with torch.no_grad():
        ours = task.runtime.embed(model, task.collate([example]))
        for vector, document in zip(ours, example.documents, strict=True):
            ids = torch.from_numpy(document.input_ids.astype(np.int64))[None]
            hidden = model(input_ids=ids).last_hidden_state[0]
            alone = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            torch.testing.assert_close(vector, alone, atol=1e-5, rtol=1e-5)


def test_vectors_have_length_one(bench: Any, bases: Any) -> None:
    task = bench("sentence-embedding")
    batch = task.collate(task.encode(PAIRS))
    vectors = task.runtime.embed(task.load(bases["bert"]), batch)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 9)


def test_the_supervised_loss_is_the_squared_error_of_the_cosine(bench: Any, bases: Any) -> None:
    task = bench("sentence-embedding", most_similar=5.0)
    model = task.load(bases["bert"])
    examples = task.encode(SCORED, format="similarity")
    with torch.no_grad():
        vectors = task.runtime.embed(model, task.collate(examples)).view(3, 2, -1)
        cosines = (vectors[:, 0] * vectors[:, 1]).sum(dim=1)
        ours = task.loss(model, examples)
    expected = ((cosines - torch.tensor([1.0, 0.0, 0.5])) ** 2).sum()
    assert float(ours.loss) == pytest.approx(float(expected), abs=1e-6)
    assert ours.outcomes["vectors"].shape == (3, 2, 32)


def outcomes(examples: list[Any], vectors: Any) -> list[Outcome]:
    return [
        Outcome(example, {"vectors": np.array(value, dtype=np.float32)})
        for example, value in zip(examples, vectors, strict=True)
    ]


def test_scores_by_hand(bench: Any) -> None:
    task = bench("sentence-embedding", most_similar=5.0)
    vectors = [[[1, 0], [1, 0]], [[1, 0], [0, 3]], [[1, 0], [1, 1]]]
    seen = Evaluated(0.1, outcomes=outcomes(task.encode(SCORED, format="similarity"), vectors))
    values = task.runtime.metrics(["spearman", "pearson", "f1_max", "ndcg_at_10"], seen)
    assert values.keys() == {"spearman", "pearson"}
    assert values["spearman"] == pytest.approx(1.0)
    assert list(task.runtime.predictions(seen))[1] == {"row": 1, "prediction": 0.0, "label": 0.0}


def test_scores_of_yes_and_no_have_a_best_threshold(bench: Any) -> None:
    task = bench("sentence-embedding")
    rows = [{**row, "score": score} for row, score in zip(SCORED, (1, 0, 1), strict=True)]
    vectors = [[[1, 0], [1, 0]], [[1, 0], [0, 3]], [[1, 0], [1, 1]]]
    seen = Evaluated(0.1, outcomes=outcomes(task.encode(rows, format="similarity"), vectors))
    values = task.runtime.metrics(["f1_max", "f1_max_threshold"], seen)
    assert values == {"f1_max": 1.0, "f1_max_threshold": pytest.approx(0.5**0.5)}


def test_ranks_by_hand(bench: Any) -> None:
    task = bench("sentence-embedding")
    # Two rows have the same positive: it stands in the corpus once, and is right for both.
    vectors = [
        [[1, 0], [1, 0.1], [0, 1]],
        [[0, 1], [1, 1], [0.1, 1]],
        [[1, 0], [1, 0.1], [1, 0.05]],
    ]
    seen = Evaluated(0.1, outcomes=outcomes(task.encode(PAIRS), vectors))
    names = ["mrr_at_10", "recall_at_1", "triplet_accuracy"]
    assert [row["rank"] for row in task.runtime.predictions(seen)] == [2, 3, 2]
    assert task.runtime.metrics(names, seen) == {
        "mrr_at_10": pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3),
        "recall_at_1": 0.0,
        "triplet_accuracy": pytest.approx(1 / 3),
    }


def test_rows_that_cannot_be_are_refused(bench: Any) -> None:
    with pytest.raises(InvalidData, match="row 0: its score is beyond 1"):
        bench("sentence-embedding").encode(SCORED[:1], format="similarity")
    with pytest.raises(InvalidData, match="row 1: it has 2 texts and the rows before 3"):
        bench("sentence-embedding").encode([PAIRS[0], {**PAIRS[1], "negatives": []}])


def written(task: Any, model: Any, folder: Path) -> Path:
    task.export(model, folder)
    task.tokenizer.save_pretrained(folder)
    for path, document in task.runtime.export_files().items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_json(folder / path, document)
    return folder


def test_an_export_names_its_modules(bench: Any, bases: Any, tmp_path: Path) -> None:
    task = bench("sentence-embedding", pooling="cls")
    written(task, task.adapt(task.load(bases["bert"]), "lora"), tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    pooling = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert pooling["pooling_mode_cls_token"] is True
    assert pooling["pooling_mode_mean_tokens"] is False


def test_sentence_transformers_gives_the_same_vectors(
    bench: Any, bases: Any, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    task = bench("sentence-embedding")
    model = task.adapt(task.load(bases["bert"]), "full").eval()
    loaded = library.SentenceTransformer(str(written(task, model, tmp_path)), device="cpu")
    texts = ["who is good", "in the sea"]
    rows = [{"anchor": texts[0], "positive": texts[1], "negatives": []}]
    with torch.no_grad():
        ours = task.runtime.embed(model, task.collate(task.encode(rows)))
    theirs = loaded.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
