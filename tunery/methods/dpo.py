"""Direct preference optimization: make the preferred reply likelier than the other one.

With d = (log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l)) over a pair's replies w and l:

    loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)

e is `label_smoothing`, the share of pairs taken to be labelled the wrong way round. The reference
is the untrained model: the adapter switched off, or remembered from before the first step. Other
losses of the family stand in `_dpo_losses.py`; several may be added up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunery.entries import Hyperparameters, Method
from tunery.methods import _preference
from tunery.methods._dpo_losses import LOSSES, Ratios

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from tunery.entries import EntryConfig
    from tunery.training.types import Batch, Example, LossOutput, MethodRun, Objective, TokenLosses

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]


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
    loss_type: LossType | tuple[LossType, ...] = Field(
        "sigmoid",
        description="The loss, by its name in TRL, or several to add up. `sft` is the mean "
        "negative log-likelihood of the preferred replies' tokens.",
    )
    loss_weights: tuple[float, ...] | None = Field(
        None, description="A factor for each of several losses; by default all are 1."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of pairs taken to be labelled the wrong way round, for the losses "
        "`sigmoid`, `robust` and `exo_pair`.",
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

    @property
    def losses(self) -> dict[LossType, float]:
        """Names and factors of what is added up."""
        names = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        return dict(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    @model_validator(mode="after")
    def _losses_make_sense(self) -> DpoConfig:
        names = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        if not names or len(set(names)) != len(names):
            raise ValueError("loss_type: one loss or more, each once")
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ValueError(f"loss_weights: {len(names)} factors are expected, one for each loss")
        if "exo_pair" in names and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0")
        return self


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
    example_row: ClassVar[Mapping[str, Any]] = _preference.EXAMPLE_ROW

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
    loss_type: str = "sigmoid",
    tokens_B2: Tensor | None = None,
) -> Tensor:
    """Loss of each of B pairs, in nats, shape (B,).

    Each argument is the summed log-probability of a reply, shape (B,), float32: near -500
    neighbouring bfloat16 values are 2 nats apart, more than most margins.

    Args:
        tokens_B2: lengths of the replies, for the losses that count by token.

    Raises:
        ValueError: the four batches differ in shape.
    """
    shapes = {tuple(t.shape) for t in (chosen_B, rejected_B, ref_chosen_B, ref_rejected_B)}
    if len(shapes) != 1:
        raise ValueError(f"pairs of different shapes: {sorted(shapes)}")
    lengths_B2 = chosen_B.new_ones(len(chosen_B), 2) if tokens_B2 is None else tokens_B2
    ratios = Ratios(
        chosen=chosen_B - ref_chosen_B,
        rejected=rejected_B - ref_rejected_B,
        chosen_tokens=lengths_B2[:, 0],
        rejected_tokens=lengths_B2[:, 1],
        beta=beta,
        smoothing=label_smoothing,
    )
    return LOSSES[loss_type](ratios)


class _Preference:
    def __init__(self, config: DpoConfig, run: MethodRun) -> None:
        self._config = config
        self._run = run
        self._reference = _preference.Reference(
            run,
            lambda model, batch: _pairs(run.token_losses(model, batch), batch),
            remembers=config.precompute_ref_log_probs,
            drops=not config.disable_dropout,
        )
        self._step = (1, 1)
        """Pairs, and tokens of preferred replies, of the whole step."""

    def units(self, example: Example) -> float:
        """One for each pair of two replies: the loss is the mean over them.

        Raises:
            InvalidConfig: the example is not a pair.
        """
        return _preference.pair_units(example)

    def prepare(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Turn dropout off, and remember the reference's scores if that is how it goes."""
        if self._config.disable_dropout:
            _preference.no_dropout(model)
        self._reference.prepare(model, batches)

    def begin(self, examples: Iterable[Example]) -> None:
        """Count what the likelihood of preferred replies is a mean over."""
        if "sft" in self._config.losses:
            self._step = _preference.chosen_tokens(examples)

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Sum over the batch's pairs, and TRL's names for the rewards and their margins."""
        from tunery.training.types import LossOutput

        tokens = self._run.token_losses(model, batch)
        chosen, rejected = _pairs(tokens, batch).unbind(1)
        ref_chosen, ref_rejected = self._reference(model, batch).unbind(1)
        whole = _preference.whole(batch)
        total = chosen.new_zeros(())
        for name, weight in self._config.losses.items():
            if name == "sft":
                total = total + weight * self._likelihood(tokens, batch)
                continue
            losses = dpo_loss(
                chosen,
                rejected,
                ref_chosen,
                ref_rejected,
                beta=self._config.beta,
                label_smoothing=self._config.label_smoothing,
                loss_type=name,
                tokens_B2=batch.document_tokens().view(-1, 2),
            )
            total = total + weight * (losses * whole).sum()
        sums = _preference.pair_sums(
            whole,
            chosen - ref_chosen,
            rejected - ref_rejected,
            self._config.beta,
            chosen=chosen,
            rejected=rejected,
        )
        return LossOutput(loss=total, sums=sums)

    def _likelihood(self, tokens: TokenLosses, batch: Batch) -> Tensor:
        """The batch's part of the step's mean over tokens, times its pairs: the loop divides."""
        pairs, count = self._step
        return (tokens.nll * _preference.of_chosen(batch)).sum() * (pairs / max(count, 1))


def _pairs(tokens: TokenLosses, batch: Batch) -> Tensor:
    """Summed log-probabilities (E, 2): preferred, non-preferred."""
    return tokens.document_logprobs(batch).view(-1, 2)
