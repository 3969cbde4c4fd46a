"""What an entry of each shelf promises.

An entry is a module (or a folder) on a shelf: `tunery/adapters`, `tunery/methods`, `tunery/tasks`,
`tunery/transforms`, `tunery/rewards`. Its last line, `ENTRY: type[Adapter] = Lora`, is how
`tunery.catalogue` finds it and where mypy checks that it fits. Nothing at module level may import
torch: the API reads every entry to publish its schema and to check requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from tunery.spec import BaseModelRef
    from tunery.training.hooks import StepHook, StepsRun
    from tunery.training.types import AdapterRun, MethodRun, Objective, TaskRuntime

DataFormat = str
"""Name of a format that `tunery.data.formats` knows: chat, preference, classification, ..."""


class EntryConfig(BaseModel):
    """Settings of one entry. Unknown keys are refused; every field says what it means."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Hyperparameters(EntryConfig):
    """What every method that descends a gradient is told. A method's `Config` extends this.

    `"auto"` in a request means: leave it to the resolver, which fills the field from the adapter's
    and the data's facts and says in `ext.resolved` where the value came from.
    """

    n_epochs: float = Field(3, gt=0, le=100, description="Passes over the training file.")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000,
        description="Optimizer steps after which to stop; overrides n_epochs.",
    )
    batch_size: int = Field(
        8, ge=1, le=4096, description="Examples per optimizer step, over all devices."
    )
    learning_rate: float = Field(2e-4, gt=0, le=10, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate over the steps after warm-up."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Share of all steps spent warming up."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Warm-up steps; overrides warmup_ratio."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's denominator floor.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this global L2 norm; 0 turns it off."
    )
    max_length: int = Field(
        1024, ge=8, le=1_048_576, description="Tokens an example may have; what is over is cut off."
    )
    packing: bool = Field(
        True,
        description="Fill micro-batches by tokens instead of padding: documents share a row where "
        "attention can be kept apart, else rows of like length share a micro-batch.",
    )
    logging_steps: int = Field(1, ge=1, description="Optimizer steps between metric points.")

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps made of each batch of rows: several where completions are reused."""
        return 1

    @property
    def row_length(self) -> int:
        """Tokens that a row may have: fewer than an example where a completion is to follow."""
        return self.max_length


class Entry(Protocol):
    """What all shelves share. All attributes are class attributes."""

    name: ClassVar[str]
    """As it stands in a request's `type`, snake_case or the field's own spelling."""
    title: ClassVar[str]
    summary: ClassVar[str]
    """One sentence for the new-job form."""
    paper: ClassVar[str | None]
    """Authors, title, year and arXiv id; None where there is no paper."""
    Config: ClassVar[type[EntryConfig]]
    example: ClassVar[Mapping[str, Any]]
    """The entry's part of a request, working as printed."""


class Adapter(Entry, Protocol):
    """WHICH parameters train."""

    tasks: ClassVar[frozenset[str] | None]
    """Tasks it works with; None means all."""
    methods: ClassVar[frozenset[str] | None]
    strategies: ClassVar[frozenset[str] | None]
    """Ways for ranks to cooperate (`ext.compute.strategy`) that it works under; None means all."""
    default_learning_rate: ClassVar[float]
    """Used when the request says "auto" or nothing."""
    mergeable: ClassVar[bool]
    """Whether the trained adapter can be folded into the base's weights."""
    half_precision: ClassVar[bool]
    """Whether what trains can run in the base's half precision, with float32 masters beside it."""

    def trainable_parameters(self, config: Any, shape: ModelShape) -> int:
        """Number of trained scalars for a base model of this shape, by formula."""
        ...

    def starts_as_base(self, config: Any) -> bool:
        """Whether the model with the fresh adapter answers exactly as the base does."""
        ...

    def base_when_disabled(self, config: Any) -> bool:
        """Whether PEFT's `disable_adapter` gives the untrained base back: a free reference model.

        False where the base's own weights train or were changed.
        """
        ...

    def apply(self, config: Any, run: AdapterRun) -> Any:
        """Return the model with the adapter in place: only its parameters require gradients.

        A PEFT adapter returns a `PeftModel`, seeded by `run.seed`.
        """
        ...


@runtime_checkable
class Rated(Protocol):
    """An adapter whose parameters do not all learn at one rate."""

    def rate(self, config: Any, parameter: str) -> float:
        """What multiplies the learning rate of the parameter of that name."""
        ...


@runtime_checkable
class Stepping(Protocol):
    """An adapter that does something in each optimizer step; it trains on one rank or under ddp."""

    def hook(self, config: Any, run: StepsRun) -> StepHook | None:
        """What it does, or None where these settings ask for nothing."""
        ...


@runtime_checkable
class Loads(Protocol):
    """An adapter that has its base loaded in a way of its own, such as quantised."""

    devices: ClassVar[frozenset[str]]
    """Kinds of device that this works on: cpu, cuda."""

    def weight_bytes(self, config: Any) -> float:
        """Bytes that a weight of the base takes."""
        ...

    def load_options(self, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` that leave the base on the device."""
        ...


@runtime_checkable
class InCache(Protocol):
    """An adapter that lives in the attention's cache, which recomputed activations go without."""

    needs_cache: ClassVar[bool]
    """True."""


class Task(Entry, Protocol):
    """WHAT the model does and is measured by."""

    formats: ClassVar[frozenset[str]]
    """Data formats that it reads, by their names in `tunery.data.formats`."""
    metrics: ClassVar[tuple[str, ...]]
    """Names it can report, offline."""
    default_metrics: ClassVar[tuple[str, ...]]
    example_row: ClassVar[Mapping[str, Any]]

    def runtime(self, config: Any) -> TaskRuntime:
        """The half that needs torch: model class, encoding, collation, metrics."""
        ...


class Method(Entry, Protocol):
    """HOW training goes. `Config` extends `Hyperparameters`."""

    formats: ClassVar[frozenset[str] | None]
    """Data formats that it trains on; None means all whose rows say the right answer."""
    tasks: ClassVar[frozenset[str] | None]
    """Tasks it works with; None means all."""
    learning_rate_factor: ClassVar[float]
    """Multiplies the adapter's default learning rate: preference methods want less."""
    example_row: ClassVar[Mapping[str, Any]]

    def objective(self, config: Any, run: MethodRun) -> Objective:
        """Batch in, loss and metrics out."""
        ...


@runtime_checkable
class NeedsModels(Protocol):
    """A method that reads other base models beside the one that trains: a teacher, say."""

    def models(self, config: Any) -> Sequence[BaseModelRef]:
        """Which ones; a run finds them under these names."""
        ...


@runtime_checkable
class MakesExamples(Protocol):
    """A method whose examples are not the rows of the file, but made of them."""

    def examples(self, tokens: float, max_length: int) -> int:
        """How many there will be, of a file of about so many tokens."""
        ...


class Transform(Entry, Protocol):
    """What is done to rows first. Pure: the same row and config give the same row."""

    formats: ClassVar[frozenset[str]]
    """Formats it accepts."""

    def produces(self, config: Any, format: str) -> str:
        """Format of the rows out, for rows of this format in."""
        ...

    def apply(
        self, config: Any, rows: Sequence[dict[str, Any]], tokenizer: Any
    ) -> list[dict[str, Any]]:
        """Rows in, rows out. `tokenizer` is a transformers tokenizer."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion, and the row of the data file that it answers."""

    item: Mapping[str, Any]
    output_text: str


@dataclass(frozen=True, slots=True)
class Grade:
    """What a reward says of a sample.

    Attributes:
        reward: None where the reward does not apply: such a sample teaches nothing.
        parts: of a reward that is made of others, theirs by name.
        error: why the sample could not be graded as it should have been.
    """

    reward: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    error: str | None = None


class Reward(Entry, Protocol):
    """HOW GOOD a completion is, for methods that learn from their own. Its settings stand in a
    request as `{type, name?, ...settings}`."""

    def templates(self, config: Any) -> Sequence[str]:
        """The templates that grading renders: what they name is looked for in every row first."""
        ...

    def grade(self, config: Any, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample, in order.

        Raises:
            tunery.errors.InvalidData: a row cannot be graded by; never for what a model said.
        """
        ...


class ModelShape(EntryConfig):
    """A base model's arithmetic, read from its `config.json` alone."""

    architecture: str = Field(description="For instance LlamaForCausalLM.")
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    linear_shapes: dict[str, tuple[int, int]] = Field(
        default_factory=dict,
        description="Per layer: name of each linear module, such as q_proj, to (in, out) features.",
    )
    parameters: int = Field(0, description="All of the base's parameters.")
    num_labels: int | None = None
