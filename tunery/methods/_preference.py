"""What methods share that compare replies: their scores, and those of the untrained model."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from tunery.training.types import Batch, Example, MethodRun, Sums

EXAMPLE_ROW: Mapping[str, Any] = {
    "input": {"messages": [{"role": "user", "content": "Is the shop open on Sunday?"}]},
    "preferred_output": [{"role": "assistant", "content": "Yes, from ten to four."}],
    "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
}


def pair_units(example: Example) -> float:
    """1; 0 for a pair of which a reply is empty, cut off by `max_length`: nothing can be compared.

    Raises:
        InvalidConfig: the example is not a pair.
    """
    if len(example.documents) != 2:
        raise InvalidConfig(f"row {example.index} is not a pair of replies")
    return float(all(document.weighted for document in example.documents))


def chosen_tokens(examples: Iterable[Example]) -> tuple[int, int]:
    """Number of whole pairs, and of supervised tokens of their preferred replies."""
    counts = [example.documents[0].supervised for example in examples if pair_units(example)]
    return len(counts), sum(counts)


def whole(batch: Batch) -> Tensor:
    """bool (E,): which pairs have both replies, as `pair_units` has it."""
    return (_weights(batch)[1].view(-1, 2) > 0).all(dim=1)


def of_chosen(batch: Batch) -> Tensor:
    """bool (S,): which supervised tokens are those of preferred replies, of whole pairs."""
    return (batch.target_documents % 2 == 0) & whole(batch)[batch.target_documents // 2]


def mean_logps(nll_S: Tensor, batch: Batch) -> Tensor:
    """Mean log-probability of the tokens of both replies, each by its weight: float32 (E, 2)."""
    from tunery.training.types import document_sums

    weights_S, weights_D = _weights(batch)
    return (document_sums(batch, -nll_S * weights_S) / weights_D.clamp(min=1e-9)).view(-1, 2)


def _weights(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the supervised tokens, (S,), and their sums over documents, (D,); float32."""
    import torch

    from tunery.training.types import document_sums

    weights_S = batch.target_weights
    if weights_S is None:
        weights_S = torch.ones_like(batch.target_ids, dtype=torch.float32)
    return weights_S, document_sums(batch, weights_S)


def pair_sums(
    whole_B: Tensor, chosen_B: Tensor, rejected_B: Tensor, beta: float, **logps: Tensor
) -> Sums:
    """TRL's metrics of B pairs.

    Args:
        whole_B: which of them count.
        chosen_B, rejected_B: log-probabilities, or ratios of them, that make rewards by `beta`.
        logps: further values to take the mean of, (B,), by the end of their names.
    """
    good, bad = beta * chosen_B.detach(), beta * rejected_B.detach()
    values = {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/margins": good - bad,
        "rewards/accuracies": (good > bad).float(),
        **{f"logps/{name}": value.detach() for name, value in logps.items()},
    }
    return {name: ((value * whole_B).sum(), whole_B.sum()) for name, value in values.items()}


class Reference:
    """The untrained model's scores: asked for at each step, or once before the first.

    Args:
        scores: (E, K) of a model and a batch.
        remembers: score everything once; always so where the untrained model is not at hand later.
        drops: the policy keeps its dropout, which a reference must be without.
    """

    def __init__(self, run: MethodRun, scores: Any, *, remembers: bool, drops: bool) -> None:
        self._run, self._scores, self._drops = run, scores, drops
        self._remembers = remembers or run.reference is None
        self._known: dict[int, Tensor] = {}
        """By `Batch.indices`: float32 (K,), on the device."""

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Look at the untrained model, if that is how it goes."""
        if not self._remembers:
            return
        was_training = model.training
        model.eval()
        for batch in batches:
            for index, scores in zip(batch.indices, self._ask(model, batch), strict=True):
                self._known[index] = scores
        model.train(was_training)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """(E, K), without graph."""
        if self._remembers:
            import torch

            return torch.stack([self._known[index] for index in batch.indices])
        return self._ask(model, batch)

    def _ask(self, model: nn.Module, batch: Batch) -> Tensor:
        import torch

        untrained = self._run.reference or nullcontext
        drops = model.training and self._drops
        with torch.no_grad(), untrained(), evaluating(model) if drops else nullcontext():
            scores: Tensor = self._scores(model, batch)
            return scores


class Untrained:
    """The untrained model's log-probabilities of replies that are not known beforehand.

    The adapter is switched off; where that does not bring the untrained model back, as in full
    fine-tuning, a copy of it is kept.
    """

    def __init__(self, run: MethodRun, *, drops: bool) -> None:
        self._run, self._drops = run, drops
        self._losses = run.token_losses
        self._copy: nn.Module | None = None

    def prepare(self, model: nn.Module) -> None:
        """Before the first step."""
        import copy

        if self._run.reference is not None:
            return
        assert self._run.losses_of is not None
        self._copy = copy.deepcopy(model).eval().requires_grad_(False)
        self._losses = self._run.losses_of(self._copy)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over each document's supervised tokens: float32 (D,), without graph."""
        import torch

        untrained = nullcontext if self._copy is not None else self._run.reference or nullcontext
        asked = model if self._copy is None else self._copy
        drops = asked.training and self._drops
        with torch.no_grad(), untrained(), evaluating(asked) if drops else nullcontext():
            return self._losses(asked, batch).document_logprobs(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, a training model is without dropout."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def no_dropout(model: nn.Module) -> None:
    """Dropout layers, and the rates that attention modules hand to their kernel, set to 0."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
