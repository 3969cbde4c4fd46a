"""Contrastive learning: texts that belong together become near, others far.

Multiple negatives ranking (Henderson et al. 2017, arXiv 1705.00652; van den Oord et al. 2018, arXiv
1807.03748). With unit vectors a_i and candidates c_j, which are the positives and negatives of all
rows of the optimizer step,

    loss_i = -log( exp(s a_i.c_i) / sum_j exp(s a_i.c_j) )

A step's loss looks at all of its rows at once, however it is cut to fit the memory: its gradient
with respect to the vectors is formed first, from vectors without graph, and each micro-batch then
carries its own part of it back into the model (Gao et al. 2021, arXiv 2101.06983). Dropout is off,
so that a text has one vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.errors import InvalidConfig
from tunery.tasks.sentence_embedding import has_score

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from tunery.entries import EntryConfig
    from tunery.tasks.sentence_embedding import Runtime
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective


class ContrastiveConfig(Hyperparameters):
    n_epochs: float = Field(1, gt=0, le=100, description="Passes over the training file.")
    batch_size: int = Field(
        32,
        ge=2,
        le=65536,
        description="Rows per optimizer step, over all devices. Each is told from all others of "
        "its step: more rows, harder choices.",
    )
    max_length: int = Field(
        256, ge=8, le=1_048_576, description="Tokens a text may have; what is over is cut off."
    )
    loss: Literal["multiple_negatives_ranking", "cosine", "triplet"] = Field(
        "multiple_negatives_ranking",
        description="What is learnt. multiple_negatives_ranking: of all texts of the step, which "
        "is the anchor's (pairs, with or without negatives). triplet: the positive is nearer than "
        "the negative by a margin (pairs with one negative). cosine: the cosine is the score "
        "(similarity rows).",
    )
    scale: float = Field(
        20.0,
        gt=0,
        le=1000,
        description="multiple_negatives_ranking: cosines are multiplied by it, an inverse "
        "temperature.",
    )
    symmetric: bool = Field(
        False,
        description="multiple_negatives_ranking: also ask which anchor is the positive's; the loss "
        "is the mean of both.",
    )
    margin: float = Field(
        0.5, gt=0, description="triplet: how much nearer, in cosine distance, which is 0 to 2."
    )


class Contrastive:
    name: ClassVar[str] = "contrastive"
    title: ClassVar[str] = "Contrastive"
    summary: ClassVar[str] = "Draws texts that belong together near, and others apart."
    paper: ClassVar[str | None] = (
        "Henderson et al.: Efficient Natural Language Response Suggestion for Smart Reply, 2017, "
        "arXiv 1705.00652"
    )
    Config: ClassVar[type[EntryConfig]] = ContrastiveConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"pairs", "similarity"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"sentence-embedding"})
    learning_rate_factor: ClassVar[float] = 1.0
    example: ClassVar[Mapping[str, Any]] = {
        "type": "contrastive",
        "contrastive": {"hyperparameters": {"loss": "multiple_negatives_ranking", "n_epochs": 1}},
    }
    example_row: ClassVar[Mapping[str, Any]] = {
        "anchor": "Is the shop open on Sunday?",
        "positive": "On Sundays we open from ten to four.",
        "negative": "The shop stands in the old mill.",
    }

    def objective(self, config: ContrastiveConfig, run: MethodRun) -> Objective:
        """The loss that the settings name."""
        if config.loss == "multiple_negatives_ranking":
            return _Ranking(config, run)
        return _Cosine(run) if config.loss == "cosine" else _Triplet(config, run)


def ranking_losses(
    anchors_EH: Tensor, candidates_CH: Tensor, *, scale: float, symmetric: bool = False
) -> Tensor:
    """Loss of each of E anchors, in nats: (E,). The first E candidates are their positives.

    Raises:
        ValueError: fewer candidates than anchors.
    """
    import torch
    from torch.nn import functional

    count = len(anchors_EH)
    if len(candidates_CH) < count:
        raise ValueError(f"{count} anchors and {len(candidates_CH)} candidates")
    scores_EC = scale * _cosines(anchors_EH, candidates_CH)
    own_E = torch.arange(count, device=scores_EC.device)
    losses_E = functional.cross_entropy(scores_EC, own_E, reduction="none")
    if symmetric:
        back_E = functional.cross_entropy(scores_EC[:, :count].T, own_E, reduction="none")
        losses_E = (losses_E + back_E) / 2
    return losses_E


def triplet_losses(
    anchors_EH: Tensor, positives_EH: Tensor, negatives_EH: Tensor, *, margin: float
) -> Tensor:
    """max(0, d(a, p) - d(a, n) + margin) of each of E rows, d being 1 - cosine: (E,)."""
    from torch.nn import functional

    near_E = functional.cosine_similarity(anchors_EH, positives_EH)
    far_E = functional.cosine_similarity(anchors_EH, negatives_EH)
    return functional.relu(far_E - near_E + margin)


def _cosines(left_EH: Tensor, right_CH: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.normalize(left_EH, dim=1) @ functional.normalize(right_CH, dim=1).T


class _Vectors:
    """What the losses share: the task's vectors, without dropout."""

    def __init__(self, run: MethodRun) -> None:
        self._task = cast("Runtime", run.task)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Turn dropout off."""
        from tunery.methods._preference import no_dropout

        no_dropout(model)

    def _out(
        self, losses: Tensor, vectors_DH: Tensor, batch: Batch, model: nn.Module
    ) -> LossOutput:
        from tunery.training.types import LossOutput

        kept = {} if model.training else self._task.kept(vectors_DH.detach(), batch)
        return LossOutput(loss=losses.sum(), outcomes=kept)


class _Cosine(_Vectors):
    def __init__(self, run: MethodRun) -> None:
        super().__init__(run)
        self._run = run

    def units(self, example: Example) -> float:
        if not has_score(example):
            raise InvalidConfig(
                "loss 'cosine' learns from rows of two sentences and a score",
                param="method.contrastive.hyperparameters.loss",
            )
        return 1.0

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        return self._task.supervised_loss(model, batch, self._run)


class _Triplet(_Vectors):
    def __init__(self, config: ContrastiveConfig, run: MethodRun) -> None:
        super().__init__(run)
        self._margin = config.margin

    def units(self, example: Example) -> float:
        if has_score(example) or len(example.documents) != 3:
            raise InvalidConfig(
                "loss 'triplet' learns from rows of an anchor, a positive and one negative",
                param="method.contrastive.hyperparameters.loss",
            )
        return 1.0

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        vectors_DH = self._task.embed(model, batch)
        losses_E = triplet_losses(*(vectors_DH[i::3] for i in range(3)), margin=self._margin)
        return self._out(losses_E, vectors_DH, batch, model)


class _Ranking(_Vectors):
    """Sees steps: the losses of a step's rows and their slopes are remembered by row."""

    def __init__(self, config: ContrastiveConfig, run: MethodRun) -> None:
        super().__init__(run)
        self._config = config
        self._groups: list[list[Example]] = []
        self._group_of: dict[int, int] = {}
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        """Row to loss (), hit () and slope (texts, H)."""

    def units(self, example: Example) -> float:
        if has_score(example):
            raise InvalidConfig(
                "loss 'multiple_negatives_ranking' learns from pairs of anchor and positive",
                hint="set loss to cosine for sentences with scores",
                param="method.contrastive.hyperparameters.loss",
            )
        return 1.0

    def begin(self, examples: Iterable[Example]) -> None:
        """Rows are told apart within groups of the batch's size: a step is one, an evaluation has
        as many as it takes, in the order of the file."""
        rows = list(examples)
        size = self._config.batch_size
        self._groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._group_of = {
            example.index: number for number, group in enumerate(self._groups) for example in group
        }
        self._known = {}

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's rows, and the share of anchors whose positive scores highest."""
        import torch

        missing = {self._group_of[index] for index in batch.indices if index not in self._known}
        if len(self._groups) == 1 and len(self._groups[0]) == len(batch.indices):
            return self._whole(model, batch)
        for number in sorted(missing):
            self._remember(model, batch, self._groups[number])
        vectors_DH = self._task.embed(model, batch)
        known = [self._known[index] for index in batch.indices]
        losses_E, hits_E = (torch.stack([row[i] for row in known]) for i in (0, 1))
        slopes_DH = torch.cat([row[2] for row in known])
        carried = (vectors_DH * slopes_DH).sum()
        out = self._out(losses_E, vectors_DH, batch, model)
        out.loss = out.loss + carried - carried.detach()
        out.sums["accuracy"] = (hits_E.sum(), hits_E.new_full((), len(hits_E)))
        return out

    def _whole(self, model: nn.Module, batch: Batch) -> LossOutput:
        """The step is one micro-batch: nothing has to be remembered."""
        vectors_DH = self._task.embed(model, batch)
        losses_E, hits_E = self._losses(vectors_DH, len(batch.indices))
        out = self._out(losses_E, vectors_DH, batch, model)
        out.sums["accuracy"] = (hits_E.sum(), hits_E.new_full((), len(hits_E)))
        return out

    def _losses(self, vectors_DH: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Losses and hits of rows whose texts stand together: (E,) each."""
        import torch

        vectors_ETH = vectors_DH.view(rows, -1, vectors_DH.shape[1])
        others = [vectors_ETH[:, text] for text in range(1, vectors_ETH.shape[1])]
        candidates_CH = torch.cat(others)
        config = self._config
        losses_E = ranking_losses(
            vectors_ETH[:, 0], candidates_CH, scale=config.scale, symmetric=config.symmetric
        )
        with torch.no_grad():
            best_E = _cosines(vectors_ETH[:, 0], candidates_CH).argmax(dim=1)
            hits_E = (best_E == torch.arange(rows, device=best_E.device)).float()
        return losses_E, hits_E

    def _remember(self, model: nn.Module, batch: Batch, group: Sequence[Example]) -> None:
        """Form the group's losses and their slopes by all of its vectors."""
        import torch

        with torch.no_grad():
            parts = [self._task.embed(model, part) for part in self._parts(batch, group)]
        with torch.enable_grad():
            vectors_DH = torch.cat(parts).requires_grad_()
            losses_E, hits_E = self._losses(vectors_DH, len(group))
            (slopes_DH,) = torch.autograd.grad(losses_E.sum(), vectors_DH)
        texts = len(vectors_DH) // len(group)
        for example, loss, hit, slope in zip(
            group, losses_E.detach(), hits_E, slopes_DH.view(len(group), texts, -1), strict=True
        ):
            self._known[example.index] = (loss, hit, slope)

    def _parts(self, batch: Batch, group: Sequence[Example]) -> Iterable[Batch]:
        """The group in batches no larger than this one, which fits with its graph."""
        most = batch.input_ids.numel()
        start = 0
        while start < len(group):
            end, widest = start + 1, group[start].longest
            while end < len(group):
                wider = max(widest, group[end].longest)
                if (end + 1 - start) * len(group[end].documents) * wider > most:
                    break
                end, widest = end + 1, wider
            part = self._task.collate(group[start:end], layout="rows", pad_id=0)
            yield part.to(batch.input_ids.device)
            start = end


ENTRY: type[Method] = Contrastive
