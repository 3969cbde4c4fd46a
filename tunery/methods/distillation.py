"""Knowledge distillation: give each token the probabilities that a teacher gives it.

With p the teacher's and q the student's distribution of the next token, at a temperature, and
m = beta p + (1 - beta) q, the loss of a token is the generalised Jensen-Shannon divergence

    beta KL(p | m) + (1 - beta) KL(q | m)

whose ends are taken to be KL(p | q) at beta 0 and KL(q | p) at beta 1 (Agarwal et al., eq. 1). Its
mean over supervised tokens may be mixed with the likelihood of the data's own answers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.errors import UnsupportedCombination

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from tunery.entries import EntryConfig
    from tunery.spec import BaseModelRef
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective

CHUNK_ROWS = 512
"""Tokens whose distributions are held in float32 at once."""
TEACHER = "method.distillation.hyperparameters.teacher_model"


class DistillationConfig(Hyperparameters):
    teacher_model: str = Field(
        min_length=1,
        max_length=512,
        description="The base model to learn from, by its name. It must have the student's "
        "vocabulary.",
    )
    teacher_model_revision: str | None = Field(
        None, max_length=128, description="Commit of a teacher from a hub."
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Which divergence: 0 is KL from teacher to student, which covers all that the "
        "teacher might say; 1 is KL from student to teacher, which keeps to what it would say; "
        "between them lies the generalised Jensen-Shannon divergence.",
    )
    temperature: float = Field(
        1.0, gt=0, le=100, description="Both models' logits are divided by it."
    )
    alpha: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the data's own answers in the loss, by their likelihood; the rest is "
        "the divergence.",
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="Tokens that are learnt: the assistant's replies (of prompt/completion rows, "
        "the completions) with their end-of-turn token, or all.",
    )


class Distillation:
    name: ClassVar[str] = "distillation"
    title: ClassVar[str] = "Distillation"
    summary: ClassVar[str] = "Learns a larger model's probabilities of each token of given answers."
    paper: ClassVar[str | None] = (
        "Hinton et al.: Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; "
        "divergences after Agarwal et al.: On-Policy Distillation of Language Models, 2023, "
        "arXiv 2306.13649"
    )
    Config: ClassVar[type[EntryConfig]] = DistillationConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"chat", "prompt_completion", "text"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"text-generation"})
    learning_rate_factor: ClassVar[float] = 1.0
    example: ClassVar[Mapping[str, Any]] = {
        "type": "distillation",
        "distillation": {
            "hyperparameters": {
                "teacher_model": "HuggingFaceTB/SmolLM2-360M-Instruct",
                "beta": 0.5,
                "alpha": 0.1,
            }
        },
    }
    example_row: ClassVar[Mapping[str, Any]] = {
        "messages": [
            {"role": "user", "content": "Is the shop open on Sunday?"},
            {"role": "assistant", "content": "Yes, from ten to four."},
        ]
    }

    def models(self, config: DistillationConfig) -> Sequence[BaseModelRef]:
        """The teacher."""
        from tunery.spec import BaseModelRef

        return [BaseModelRef(name=config.teacher_model, revision=config.teacher_model_revision)]

    def objective(self, config: DistillationConfig, run: MethodRun) -> Objective:
        """The divergence from the teacher, which is loaded here.

        Raises:
            BaseModelUnavailable: the teacher is no causal language model, or not at hand.
            UnsupportedCombination: it has another vocabulary.
        """
        return _Pupil(config, run)


ENTRY: type[Method] = Distillation


def divergence(
    student_SV: Tensor, teacher_SV: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """Of each of S tokens, in nats: float32 (S,). Both arguments are logits of any precision."""
    import torch

    q = (student_SV.float() / temperature).log_softmax(dim=1)
    p = (teacher_SV.float() / temperature).log_softmax(dim=1)
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | q) of log-probabilities, (S,)."""
    return (p.exp() * (p - q)).sum(dim=1)


class _Pupil:
    def __init__(self, config: DistillationConfig, run: MethodRun) -> None:
        self._config = config
        self._run = run
        assert run.further_model is not None
        assert run.losses_of is not None
        found = run.further_model(config.teacher_model)
        _check_vocabulary(run.tokenizer, found.tokenizer)
        self._teacher: Any = found.model
        self._teacher_logits = run.losses_of(found.model).logits
        self._packs = False

    def units(self, example: Example) -> float:
        return self._run.task.units(example)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """The untrained model has nothing to say here."""

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's supervised tokens, each by its weight."""
        from tunery.training.types import LossOutput

        student_SV = self._run.token_losses.logits(model, batch)
        divergence_S, nll_S, correct_S = self._compare(student_SV, self._ask(batch), batch)
        alpha = self._config.alpha
        losses_S = (1 - alpha) * divergence_S + alpha * nll_S
        weighted = losses_S if batch.target_weights is None else losses_S * batch.target_weights
        count = correct_S.new_full((), batch.supervised)
        sums = {
            "divergence": (divergence_S.detach().sum(), count),
            "nll_loss": (nll_S.detach().sum(), count),
            "token_accuracy": (correct_S.sum(), count),
        }
        return LossOutput(loss=weighted.sum(), sums=sums)

    def _ask(self, batch: Batch) -> Tensor:
        """The teacher's logits (S, V), without graph."""
        import torch

        from tunery.training import packing

        if batch.cu_seqlens is not None and not self._packs:
            if not packing.switch_on(self._teacher):
                raise UnsupportedCombination(
                    "the teacher's attention cannot keep packed documents apart",
                    hint="set packing to false",
                    param=TEACHER,
                )
            self._packs = True
        with torch.no_grad():
            return self._teacher_logits(self._teacher, batch)

    def _compare(
        self, student_SV: Tensor, teacher_SV: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence, negative log-likelihood and hits of each token, (S,), a few at a time.

        The distributions in float32 are made again on the way back instead of being kept.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        from tunery.training.losses import token_losses

        # Heads may be padded to different widths beyond the tokens that there are.
        width = min(student_SV.shape[1], teacher_SV.shape[1])
        config = self._config

        def part(student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            parted = divergence(
                student[:, :width],
                teacher[:, :width],
                beta=config.beta,
                temperature=config.temperature,
            )
            said = token_losses(student, ids)
            return parted, said.nll, said.correct

        given = (student_SV, teacher_SV, batch.target_ids)
        pieces = zip(*(torch.split(tensor, CHUNK_ROWS) for tensor in given), strict=True)
        made = [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
        columns = [torch.cat(column) for column in zip(*made, strict=True)]
        return columns[0], columns[1], columns[2]


def _check_vocabulary(student: Any, teacher: Any) -> None:
    """Let a teacher pass whose tokens are the student's.

    Raises:
        UnsupportedCombination: they are not: nothing could be compared.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = sum(theirs.get(token) != number for token, number in ours.items())
    raise UnsupportedCombination(
        f"the teacher has another vocabulary: {len(theirs)} tokens, the student {len(ours)}, of "
        f"which {differing} are others or have other numbers there",
        hint="choose a teacher of the student's family",
        param=TEACHER,
    )
