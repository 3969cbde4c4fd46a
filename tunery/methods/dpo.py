"""Direct preference optimization: make the preferred reply likelier than the other one.

With d = (log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l)) over a pair's replies w and l:

    loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)

e is `label_smoothing`, the share of pairs taken to be labelled the wrong way round. The reference
is the untrained model: the adapter switched off, or remembered from before the first step.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunery.entries import Hyperparameters, Method
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective


class DpoConfig(Hyperparameters):
    n_epochs: float = Field(1, gt=0, le=100, description="Passes over the training file.")
    learning_rate: float = Field(2e-5, gt=0, le=10, description="Peak learning rate of AdamW.")
    beta: float = Field(
        0.1,
        gt=0,
        le=100,
        description="Inverse temperature of the implicit reward. Larger stays closer to the "
        "reference model.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs taken to be labelled the wrong way round."
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="Score all pairs with the untrained model once, before the first step, instead "
        "of at every step: pays from the second epoch on. Always done where the untrained model "
        "is not at hand later, as in full fine-tuning.",
    )
    disable_dropout: bool = Field(
        True, description="Turn all dropout off, so that policy and reference are comparable."
    )


class Dpo:
    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "DPO"
    summary: ClassVar[str] = "Learns from pairs of a preferred and a less preferred reply."
    paper: ClassVar[str | None] = (
        "Rafailov et al.: Direct Preference Optimization: Your Language Model is Secretly a Reward "
        "Model, 2023, arXiv 2305.18290"
    )
    Config: ClassVar[type[EntryConfig]] = DpoConfig
    formats: ClassVar[frozenset[str] | None] = frozenset({"preference"})
    tasks: ClassVar[frozenset[str] | None] = frozenset({"text-generation"})
    learning_rate_factor: ClassVar[float] = 0.1
    example: ClassVar[Mapping[str, Any]] = {
        "type": "dpo",
        "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 1}},
    }
    example_row: ClassVar[Mapping[str, Any]] = {
        "input": {"messages": [{"role": "user", "content": "Is the shop open on Sunday?"}]},
        "preferred_output": [{"role": "assistant", "content": "Yes, from ten to four."}],
        "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
    }

    def objective(self, config: DpoConfig, run: MethodRun) -> Objective:
        """The preference loss, with the reference that the run can give."""
        return _Preference(config, run)


ENTRY: type[Method] = Dpo


def dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each of B pairs, in nats, shape (B,).

    Each argument is the summed log-probability of a reply, shape (B,), float32: near -500
    neighbouring bfloat16 values are 2 nats apart, more than most margins.

    Raises:
        ValueError: the four batches differ in shape.
    """
    from torch.nn import functional

    shapes = {tuple(t.shape) for t in (chosen_B, rejected_B, ref_chosen_B, ref_rejected_B)}
    if len(shapes) != 1:
        raise ValueError(f"pairs of different shapes: {sorted(shapes)}")
    margin_B = (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)
    loss_B = -functional.logsigmoid(beta * margin_B)
    if label_smoothing:
        wrong_B = -functional.logsigmoid(-beta * margin_B)
        loss_B = (1 - label_smoothing) * loss_B + label_smoothing * wrong_B
    return loss_B


class _Preference:
    def __init__(self, config: DpoConfig, run: MethodRun) -> None:
        self._config = config
        self._run = run
        self._remembers = config.precompute_ref_log_probs or run.reference is None
        self._reference: dict[int, Tensor] = {}
        """By `Batch.indices`: (preferred, non-preferred), float32 (2,), on the device."""

    def units(self, example: Example) -> float:
        """One: the loss is the mean over pairs.

        Raises:
            InvalidConfig: the example is not a pair.
        """
        if len(example.documents) != 2:
            raise InvalidConfig(f"row {example.index} is not a pair of replies")
        return 1.0

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Turn dropout off, and remember the reference's scores if that is how it goes."""
        if self._config.disable_dropout:
            _no_dropout(model)
        if not self._remembers:
            return
        was_training = model.training
        model.eval()
        for batch in batches:
            for index, scores in zip(batch.indices, self._ask_reference(model, batch), strict=True):
                self._reference[index] = scores
        model.train(was_training)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's pairs, and TRL's names for the rewards and their margins."""
        import torch

        from tunery.training.types import LossOutput

        chosen, rejected = self._scores(model, batch).unbind(1)
        ref_chosen, ref_rejected = self._reference_scores(model, batch).unbind(1)
        config = self._config
        losses = dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
        )
        with torch.no_grad():
            good = config.beta * (chosen - ref_chosen)
            bad = config.beta * (rejected - ref_rejected)
            values = {
                "rewards/chosen": good,
                "rewards/rejected": bad,
                "rewards/margins": good - bad,
                "rewards/accuracies": (good > bad).float(),
                "logps/chosen": chosen.detach(),
                "logps/rejected": rejected.detach(),
            }
            count = losses.new_full((), len(losses))
            sums = {name: (value.sum(), count) for name, value in values.items()}
        return LossOutput(loss=losses.sum(), sums=sums)

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed log-probabilities (E, 2): preferred, non-preferred."""
        losses = self._run.token_losses(model, batch)
        return losses.document_logprobs(batch).view(-1, 2)

    def _reference_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._remembers:
            import torch

            return torch.stack([self._reference[index] for index in batch.indices])
        return self._ask_reference(model, batch)

    def _ask_reference(self, model: nn.Module, batch: Batch) -> Tensor:
        """(E, 2) from the untrained model, without graph and without dropout."""
        from contextlib import nullcontext

        import torch

        untrained = self._run.reference or nullcontext
        drops = model.training and not self._config.disable_dropout
        with torch.no_grad(), untrained(), _evaluating(model) if drops else nullcontext():
            return self._scores(model, batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def _no_dropout(model: nn.Module) -> None:
    """Dropout layers, and the rates that attention modules hand to their kernel."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
