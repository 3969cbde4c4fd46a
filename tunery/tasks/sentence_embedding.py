"""Sentence embedding: a vector per text, near to those of texts that mean the same.

Reimers and Gurevych: Sentence-BERT, 2019, arXiv 1908.10084.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import EntryConfig, Task
from tunery.errors import InvalidData
from tunery.evaluation.correlation import pearson, spearman
from tunery.evaluation.ranking import best_f1, mrr, ndcg, recall
from tunery.tasks._headed import Headed, load_headed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.training.types import (
        Batch,
        Document,
        EncodeOptions,
        Evaluated,
        Example,
        LossOutput,
        MethodRun,
        Outcome,
        TaskRuntime,
    )

_QUESTIONS_AT_ONCE = 1024
_MODULES = "sentence_transformers.models"


class SentenceEmbeddingConfig(EntryConfig):
    pooling: Literal["mean", "cls", "last"] = Field(
        "mean",
        description="What of the last layer is the vector: the mean over tokens, the first token "
        "(encoders), or the last one (decoders).",
    )
    normalize: bool = Field(True, description="Scale vectors to length 1.")
    most_similar: float = Field(
        1.0,
        gt=0,
        description="The score in similarity rows that stands for equal meaning: scores are "
        "divided by it. 5 for the STS benchmark.",
    )


class SentenceEmbedding:
    name: ClassVar[str] = "sentence-embedding"
    title: ClassVar[str] = "Sentence embedding"
    summary: ClassVar[str] = "A vector per text for search and similarity; sentence-transformers."
    paper: ClassVar[str | None] = (
        "Reimers and Gurevych: Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks, "
        "2019, arXiv 1908.10084"
    )
    Config: ClassVar[type[EntryConfig]] = SentenceEmbeddingConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "sentence-embedding", "pooling": "mean"}
    formats: ClassVar[frozenset[str]] = frozenset({"pairs", "similarity"})
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "spearman",
        "pearson",
        "f1_max",
        "f1_max_threshold",
        "ndcg_at_10",
        "mrr_at_10",
        "recall_at_1",
        "recall_at_10",
        "triplet_accuracy",
    )
    default_metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "spearman",
        "f1_max",
        "ndcg_at_10",
        "triplet_accuracy",
    )
    example_row: ClassVar[Mapping[str, Any]] = {
        "anchor": "How do I reset my password?",
        "positive": "Choose 'Forgot password' on the sign-in page.",
    }

    def runtime(self, config: Any) -> TaskRuntime:
        return Runtime(config or SentenceEmbeddingConfig())


class Runtime(Headed):
    """Two texts or more per example in, vectors out."""

    peft_task_type: str | None = "FEATURE_EXTRACTION"

    def __init__(self, config: SentenceEmbeddingConfig) -> None:
        self._config = config
        self._width = 0
        self._texts: int | None = None

    def load_model(
        self, path: Path, *, dtype: torch.dtype, labels: tuple[str, ...] | None, **options: Any
    ) -> PreTrainedModel:
        """The model in `path` without a head.

        Raises:
            BaseModelUnavailable: the folder does not hold a model of texts.
        """
        from transformers import AutoModel

        model = load_headed(AutoModel, path, what="embeddings", dtype=dtype, **options)
        self._width = int(model.config.hidden_size)
        return model

    def encode(
        self,
        row: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        options: EncodeOptions,
        index: int,
    ) -> Example:
        """A document per text, as the tokenizer frames it.

        Similarity: both sentences; the target is their score over the most similar one, float32
        (). Pairs: anchor, positive and negatives; the target has no entries, (0,): which texts
        belong together is all there is to know.

        Raises:
            InvalidData: a text has no tokens, a score is above the most similar one, or rows have
                unlike numbers of negatives.
        """
        import numpy as np

        from tunery.training.types import Example

        if options.format == "similarity":
            texts = [row["sentence1"], row["sentence2"]]
            target = np.asarray(self._score(row["score"], index), dtype=np.float32)
        else:
            texts = [row["anchor"], row["positive"], *row["negatives"]]
            target = np.zeros(0, dtype=np.float32)
        self._texts = self._texts or len(texts)
        if len(texts) != self._texts:
            raise InvalidData(
                f"row {index}: it has {len(texts)} texts and the rows before {self._texts}",
                code="wrong_length",
                hint="give every row the same number of negatives",
            )
        documents = tuple(_document(text, tokenizer, options.max_length, index) for text in texts)
        return Example(documents, target, index)

    def _score(self, score: float, index: int) -> float:
        if abs(score) > self._config.most_similar:
            raise InvalidData(
                f"row {index}: its score is beyond {self._config.most_similar:g}, which stands for "
                "equal meaning",
                code="wrong_type",
                hint="set the task's most_similar to the highest score",
            )
        return score / self._config.most_similar

    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """A vector per document: float32 (D, H)."""
        import torch
        from torch.nn import functional

        out = model(**batch.inputs())
        # A soft prompt's positions stand in front of the text's own.
        hidden_DTH = out.last_hidden_state[:, -batch.width :].float()
        mask = batch.attention_mask
        mask_DT = hidden_DTH.new_ones(hidden_DTH.shape[:2]) if mask is None else mask.float()
        if self._config.pooling == "cls":
            vectors_DH = hidden_DTH[:, 0]
        elif self._config.pooling == "last":
            last_D = mask_DT.sum(dim=1).long() - 1
            rows_D = torch.arange(len(last_D), device=last_D.device)
            vectors_DH = hidden_DTH[rows_D, last_D]
        else:
            mask_DT1 = mask_DT[:, :, None]
            vectors_DH = (hidden_DTH * mask_DT1).sum(dim=1) / mask_DT1.sum(dim=1)
        return functional.normalize(vectors_DH, dim=1) if self._config.normalize else vectors_DH

    def kept(self, vectors_DH: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What evaluations keep: `vectors`, (E, texts, H)."""
        return {"vectors": vectors_DH.view(len(batch.indices), -1, vectors_DH.shape[1])}

    def supervised_loss(self, model: nn.Module, batch: Batch, run: MethodRun) -> LossOutput:
        """Sum over pairs of the squared difference of cosine and score."""
        from torch.nn import functional

        from tunery.training.types import LossOutput

        vectors_DH = self.embed(model, batch)
        assert batch.targets is not None
        said_E = functional.cosine_similarity(vectors_DH[0::2], vectors_DH[1::2])
        loss = functional.mse_loss(said_E, batch.targets, reduction="sum")
        kept = {} if model.training else self.kept(vectors_DH, batch)
        return LossOutput(loss=loss, outcomes=kept)

    def metrics(self, names: Sequence[str], seen: Evaluated) -> dict[str, float]:
        """Correlations and F1 of scored pairs; ranks of each anchor's positive among all texts of
        the evaluated rows that are not anchors. All but the loss in -1..1."""
        values = {"loss": seen.loss}
        if seen.outcomes:
            first = seen.outcomes[0].example
            values |= _of_scores(seen.outcomes) if has_score(first) else _of_ranks(seen.outcomes)
        return {name: values[name] for name in names if name in values}

    def predictions(self, seen: Evaluated) -> Iterator[dict[str, Any]]:
        """The cosine of both texts beside their score; of pairs, the positive's rank from 1."""
        if seen.outcomes and not has_score(seen.outcomes[0].example):
            for outcome, rank in zip(seen.outcomes, _ranks(seen.outcomes), strict=True):
                yield {"row": outcome.example.row, "prediction": _cosine(outcome), "rank": rank}
            return
        for outcome in seen.outcomes:
            label = float(outcome.example.target)  # type: ignore[arg-type]
            yield {"row": outcome.example.row, "prediction": _cosine(outcome), "label": label}

    def export_files(self) -> dict[str, Any]:
        """What makes of the export a folder that sentence-transformers loads."""
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        if self._config.normalize:
            modules.append(("2_Normalize", "Normalize"))
        pooling = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
        kinds = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
        return {
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"{_MODULES}.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ],
            "sentence_bert_config.json": {"do_lower_case": False},
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
            "1_Pooling/config.json": {
                "word_embedding_dimension": self._width,
                **{f"pooling_mode_{kind}": kind == pooling[self._config.pooling] for kind in kinds},
            },
        }


def has_score(example: Example) -> bool:
    """Whether it is two texts and how alike they are; else texts that belong together."""
    return getattr(example.target, "size", 0) > 0


def _document(
    text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, index: int
) -> Document:
    import numpy as np

    from tunery.training.types import IGNORE, Document

    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    if not len(ids):
        raise InvalidData(f"row {index}: a text has no tokens", code="empty_text")
    nothing = np.full(len(ids), IGNORE, dtype=np.int32)
    return Document(np.asarray(ids, dtype=np.int32), nothing)


def _cosine(outcome: Outcome, other: int = 1) -> float:
    """Of an example's first text and another."""
    import numpy as np

    vectors = outcome.values["vectors"].astype(np.float64)
    sizes = float(np.linalg.norm(vectors[0]) * np.linalg.norm(vectors[other]))
    return float(vectors[0] @ vectors[other]) / sizes if sizes else 0.0


def _of_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    truths = [float(outcome.example.target) for outcome in outcomes]  # type: ignore[arg-type]
    said = [_cosine(outcome) for outcome in outcomes]
    values = {"spearman": spearman(truths, said), "pearson": pearson(truths, said)}
    if set(truths) == {0.0, 1.0}:
        best = best_f1([truth == 1 for truth in truths], said)
        values |= {"f1_max": best.f1, "f1_max_threshold": best.threshold}
    return values


def _of_ranks(outcomes: Sequence[Outcome]) -> dict[str, float]:
    ranks = _ranks(outcomes)
    values = {
        "ndcg_at_10": ndcg(ranks),
        "mrr_at_10": mrr(ranks),
        "recall_at_1": recall(ranks, 1),
        "recall_at_10": recall(ranks, 10),
    }
    if len(outcomes[0].example.documents) > 2:
        near = [
            _cosine(outcome) > max(map(lambda i: _cosine(outcome, i), _negatives(outcome)))
            for outcome in outcomes
        ]
        values["triplet_accuracy"] = sum(near) / len(near)
    return values


def _negatives(outcome: Outcome) -> range:
    return range(2, len(outcome.example.documents))


def _ranks(outcomes: Sequence[Outcome]) -> list[int]:
    """Of each anchor's positive, from 1, by cosine among all positives and negatives.

    A text that several rows have stands there once. Of equal cosines the positive comes last.
    """
    import numpy as np

    places: dict[bytes, int] = {}
    corpus: list[np.ndarray] = []
    own: list[int] = []
    for outcome in outcomes:
        texts = zip(outcome.example.documents, outcome.values["vectors"], strict=True)
        for number, (document, vector) in enumerate(texts):
            if number == 0:
                continue
            key = document.input_ids.tobytes()
            if key not in places:
                places[key] = len(corpus)
                corpus.append(vector)
            if number == 1:
                own.append(places[key])
    corpus_NH = _unit(np.stack(corpus))
    ranks: list[int] = []
    for start in range(0, len(outcomes), _QUESTIONS_AT_ONCE):
        part = outcomes[start : start + _QUESTIONS_AT_ONCE]
        anchors_QH = _unit(np.stack([outcome.values["vectors"][0] for outcome in part]))
        scores_QN = anchors_QH @ corpus_NH.T
        mine_Q = np.array(own[start : start + _QUESTIONS_AT_ONCE])
        right_Q1 = scores_QN[np.arange(len(part)), mine_Q][:, None]
        ranks += (scores_QN >= right_Q1).sum(axis=1).tolist()
    return ranks


def _unit(vectors_NH: np.ndarray) -> np.ndarray:
    import numpy as np

    sizes_N1 = np.linalg.norm(vectors_NH, axis=1, keepdims=True)
    unit: np.ndarray = vectors_NH / np.maximum(sizes_N1, 1e-12)
    return unit


ENTRY: type[Task] = SentenceEmbedding
