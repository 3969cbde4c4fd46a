"""Prompt tuning: learned embeddings in front of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from tunery.adapters import _peft
from tunery.entries import Adapter, EntryConfig
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from tunery.entries import ModelShape
    from tunery.training.types import AdapterRun


class PromptConfig(EntryConfig):
    num_virtual_tokens: int = Field(
        20, ge=1, le=1024, description="Learned embeddings, each one position of the context."
    )
    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary",
        description="vocabulary: embeddings of tokens drawn at random; text: those of init_text, "
        "repeated to the length; random: standard normal, far from any embedding.",
    )
    init_text: str | None = Field(
        None, min_length=1, max_length=10_000, description="Needed with init 'text', else null."
    )

    @model_validator(mode="after")
    def _text_where_needed(self) -> PromptConfig:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init_text belongs to init 'text', and init 'text' needs it")
        return self


class Prompt:
    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning"
    summary: ClassVar[str] = "Learns a few embeddings that stand before every input."
    paper: ClassVar[str | None] = (
        "Lester, Al-Rfou, Constant: The Power of Scale for Parameter-Efficient Prompt Tuning, "
        "2021, arXiv 2104.08691"
    )
    Config: ClassVar[type[EntryConfig]] = PromptConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "prompt", "num_virtual_tokens": 20}
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.UNDIVIDED
    default_learning_rate: ClassVar[float] = 3e-2
    mergeable: ClassVar[bool] = False
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: PromptConfig, shape: ModelShape) -> int:
        """num_virtual_tokens times the hidden size."""
        return config.num_virtual_tokens * shape.hidden_size + _peft.head_parameters(shape)

    def starts_as_base(self, config: PromptConfig) -> bool:
        """Never: the virtual tokens are read like any others."""
        return False

    def base_when_disabled(self, config: PromptConfig) -> bool:
        return True

    def apply(self, config: PromptConfig, run: AdapterRun) -> Any:
        """A `PeftModel` whose virtual tokens are set from the seed or the text.

        Raises:
            InvalidConfig: init_text has no tokens.
        """
        from peft import PromptTuningConfig

        model = _peft.wrap(
            run,
            PromptTuningConfig(
                task_type=run.task_type,
                num_virtual_tokens=config.num_virtual_tokens,
                # Of an encoder and a decoder, the former alone has a prompt, as in the paper's T5.
                num_transformer_submodules=1,
                modules_to_save=_peft.saved_modules(run),
            ),
        )
        # PEFT can start from text or vocabulary too, but then needs a tokenizer's folder, which the
        # saved configuration would name for ever.
        tokens = _start_tokens(config, run)
        if tokens:
            _set_embeddings(model, tokens)
        return model


def _start_tokens(config: PromptConfig, run: AdapterRun) -> list[int]:
    """num_virtual_tokens token ids to start from; none for a random start."""
    if config.init == "random":
        return []
    if config.init == "vocabulary":
        import torch

        generator = torch.Generator().manual_seed(run.seed)
        vocabulary = len(_table(run.model))
        size = (config.num_virtual_tokens,)
        return torch.randint(vocabulary, size, generator=generator).tolist()
    ids = run.tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InvalidConfig("init_text has no tokens", param="init_text")
    repeats = -(-config.num_virtual_tokens // len(ids))
    return list(ids * repeats)[: config.num_virtual_tokens]


def _table(model: PreTrainedModel) -> Tensor:
    """The input embeddings: (vocabulary, hidden)."""
    return cast("Tensor", model.get_input_embeddings().weight)


def _set_embeddings(model: Any, tokens: list[int]) -> None:
    import torch

    table = _table(model.get_base_model())
    with torch.no_grad():
        weight = model.prompt_encoder["default"].embedding.weight
        weight.copy_(table[torch.tensor(tokens, device=table.device)])


ENTRY: type[Adapter] = Prompt
