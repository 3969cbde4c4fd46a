"""Kahneman-Tversky optimization: replies that were wanted, and replies that were not, no pairs.

With r = log p(y|x) - log p_ref(y|x) of a reply, and z the divergence of policy from reference:

    wanted:   w+ (1 - sigmoid(beta (r - z)))
    unwanted: w- (1 - sigmoid(beta (z - r)))

z is the mean of r over prompts with other prompts' replies, not below 0, without gradient. It is
taken over the whole optimizer step: each reply stands for one step long with the prompt of the next
row, so that no part of the loss depends on how the step is cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.errors import InvalidConfig
from tunery.methods import _preference

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Document, Example, LossOutput, MethodRun, Objective


class KtoConfig(Hyperparameters):
    n_epochs: float = Field(1, gt=0, le=100, description="Passes over the training file.")
    learning_rate: float = Field(2e-5, gt=0, le=10, description="Peak learning rate of AdamW.")
    batch_size: int = Field(
        8,
        ge=2,
        le=4096,
        description="Rows per optimizer step, over all devices. The divergence from the reference "
        "is estimated over them: few make it noisy.",
    )
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="`apo_zero_unpaired` leaves the divergence out."
    )
    beta: float = Field(
        0.1,
        gt=0,
        le=100,
        description="Inverse temperature of the implicit reward. Larger stays closer to the "
        "reference model.",
    )
    desirable_weight: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="Factor of wanted replies' losses. Times their number it should be 1 to 4/3 "
        "of the same of unwanted ones.",
    )
    undesirable_weight: float = Field(
        1.0, ge=0, le=1000, description="Factor of unwanted replies' losses."
    )
    disable_dropout: bool = Field(
        True, description="Turn all dropout off, so that policy and reference are comparable."
    )


class Kto:
    name: ClassVar[str] = "kto"
    title: ClassVar[str] = "KTO"
    summary: ClassVar[str] = "Learns from single replies, each marked as wanted or not."
    paper: ClassVar[str | None] = (
        "Ethayarajh et al.: KTO: Model Alignment as Prospect Theoretic Optimization, 2024, "
        "arXiv 2402.01306"
    )
    Config: ClassVar[type[EntryConfig]] = KtoConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"unpaired_preference", "preference"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"text-generation"})
    learning_rate_factor: ClassVar[float] = 0.1
    example: ClassVar[Mapping[str, Any]] = {
        "type": "kto",
        "kto": {"hyperparameters": {"beta": 0.1, "batch_size": 16}},
    }
    example_row: ClassVar[Mapping[str, Any]] = {
        "prompt": [{"role": "user", "content": "Is the shop open on Sunday?"}],
        "completion": [{"role": "assistant", "content": "Yes, from ten to four."}],
        "label": True,
    }

    def objective(self, config: KtoConfig, run: MethodRun) -> Objective:
        """The loss, with the reference that the run can give. A pair counts as two replies."""
        return _Prospects(config, run)


ENTRY: type[Method] = Kto


def kto_loss(ratio_D: Tensor, wanted_D: Tensor, divergence: float, beta: float) -> Tensor:
    """Loss of each of D replies, in 0..1, shape (D,) (eq. 7 and 8 of the paper, lambda 1).

    Args:
        ratio_D: log p - log p_ref, float32.
        wanted_D: bool.
        divergence: z, in nats.
    """
    import torch

    sign_D = torch.where(wanted_D, 1.0, -1.0)
    return 1 - torch.sigmoid(beta * sign_D * (ratio_D - divergence))


def mismatched(documents: Sequence[Document], max_length: int) -> list[Example]:
    """Each document's prompt with the completion of the document before it, in a ring."""
    import numpy as np

    from tunery.training.types import IGNORE, Document, Example

    starts = [_completion_start(document) for document in documents]
    made = []
    for number, (document, start) in enumerate(zip(documents, starts, strict=True)):
        other, cut = documents[number - 1], starts[number - 1]
        ids = np.concatenate([document.input_ids[:start], other.input_ids[cut:]])
        prompt = np.full(start, IGNORE, dtype=np.int32)
        labels = np.concatenate([prompt, other.labels[cut:]])
        made.append(Example((Document(ids[:max_length], labels[:max_length]),), None, number))
    return made


def _completion_start(document: Document) -> int:
    """Position of the first learnt token."""
    from tunery.training.types import IGNORE

    learnt = (document.labels != IGNORE).nonzero()[0]
    return int(learnt[0]) if len(learnt) else len(document.labels)


class _Prospects:
    def __init__(self, config: KtoConfig, run: MethodRun) -> None:
        self._config = config
        self._run = run
        self._untrained = _preference.Untrained(run, drops=not config.disable_dropout)
        self._divergence = 0.0

    def units(self, example: Example) -> float:
        """Replies that have tokens: the loss is their mean.

        Raises:
            InvalidConfig: the example is neither a pair nor a reply with a label.
        """
        replies = len(example.documents)
        if replies != (2 if example.target is None else 1):
            raise InvalidConfig(f"row {example.index} is neither a marked reply nor a pair")
        return float(sum(document.supervised > 0 for document in example.documents))

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Turn dropout off, and keep a copy of the model where it cannot be had back later."""
        if self._config.disable_dropout:
            _preference.no_dropout(model)
        self._untrained.prepare(model)

    def questions(self, examples: Iterable[Example]) -> Sequence[Example]:
        """The step's prompts with other prompts' replies."""
        if self._config.loss_type != "kto":
            return ()
        documents = [document for example in examples for document in example.documents]
        spoken = [document for document in documents if document.supervised]
        return mismatched(spoken, self._config.max_length)

    def answers(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of their ratios, and their number."""
        logps_D = self._run.token_losses(model, batch).document_logprobs(batch)
        ratio_D = logps_D - self._untrained(model, batch)
        sums: Tensor = ratio_D.new_tensor([0.0, batch.documents])
        sums[0] = ratio_D.sum()
        return sums

    def told(self, totals: Sequence[float]) -> None:
        """The divergence of this step."""
        self._divergence = max(totals[0] / totals[1], 0.0)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's replies, and TRL's names for the rewards of either kind."""
        import torch

        from tunery.training.types import LossOutput

        config = self._config
        logps_D = self._run.token_losses(model, batch).document_logprobs(batch)
        ratio_D = logps_D - self._untrained(model, batch)
        wanted_D, spoken_D = _wanted(batch), batch.document_tokens() > 0
        losses_D = kto_loss(ratio_D, wanted_D, self._divergence, config.beta)
        weight_D = torch.where(wanted_D, config.desirable_weight, config.undesirable_weight)
        with torch.no_grad():
            kinds = {"chosen": wanted_D & spoken_D, "rejected": ~wanted_D & spoken_D}
            values = {"rewards": config.beta * ratio_D, "logps": logps_D}
            sums = {
                f"{value}/{kind}": ((values[value] * share).sum(), share.sum())
                for value in values
                for kind, share in kinds.items()
            }
            count = spoken_D.sum()
            sums["kl"] = (count * self._divergence, count)
        return LossOutput(loss=(weight_D * losses_D * spoken_D).sum(), sums=sums)


def _wanted(batch: Batch) -> Tensor:
    """bool (D,): of pairs, the first reply is."""
    import torch

    if batch.targets is not None:
        return batch.targets.bool()
    return torch.arange(batch.documents, device=batch.input_ids.device) % 2 == 0
