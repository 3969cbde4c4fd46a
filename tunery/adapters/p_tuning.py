"""P-tuning: learned embeddings in front of the input, made by a small network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunery.adapters import _peft
from tunery.entries import EntryConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.entries import Adapter, ModelShape
    from tunery.training.types import AdapterRun


class PTuningConfig(EntryConfig):
    num_virtual_tokens: int = Field(
        20, ge=1, le=1024, description="Learned embeddings, each one position of the context."
    )
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP",
        description="Network that makes them. MLP: three layers. LSTM: a bidirectional one and two "
        "layers, as in the paper. Only the outcome is kept in the result.",
    )
    encoder_hidden_size: int | None = Field(
        None, ge=1, le=65_536, description="Its width; null: the model's hidden size."
    )
    encoder_num_layers: int = Field(2, ge=1, le=16, description="Layers of the LSTM.")
    encoder_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropped between the LSTM's layers in training."
    )

    @model_validator(mode="after")
    def _lstm_settings_with_lstm(self) -> PTuningConfig:
        if self.encoder_reparameterization_type == "MLP" and (
            self.encoder_num_layers != 2 or self.encoder_dropout
        ):
            raise ValueError("encoder_num_layers, encoder_dropout: belong to the LSTM")
        return self


class PTuning:
    name: ClassVar[str] = "p_tuning"
    title: ClassVar[str] = "P-tuning"
    summary: ClassVar[str] = (
        "Learns a small network whose outputs stand before every input as embeddings."
    )
    paper: ClassVar[str | None] = "Liu et al.: GPT Understands, Too, 2021, arXiv 2103.10385"
    Config: ClassVar[type[EntryConfig]] = PTuningConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "p_tuning", "num_virtual_tokens": 20}
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.UNDIVIDED
    default_learning_rate: ClassVar[float] = 1e-2
    mergeable: ClassVar[bool] = False
    half_precision: ClassVar[bool] = True

    def trainable_parameters(self, config: PTuningConfig, shape: ModelShape) -> int:
        """The virtual tokens' inputs, and the network from hidden size d over width h back to d."""
        d = shape.hidden_size
        h = config.encoder_hidden_size or d
        if config.encoder_reparameterization_type == "MLP":
            network = (d + 1) * h + (h + 1) * h + (h + 1) * d
        else:
            # Four gates, two directions, two biases; later layers read both directions.
            inputs = [d, *[2 * h] * (config.encoder_num_layers - 1)]
            lstm = sum(8 * h * (width + h + 2) for width in inputs)
            network = lstm + (2 * h + 1) * 2 * h + (2 * h + 1) * d
        return config.num_virtual_tokens * d + network + _peft.head_parameters(shape)

    def starts_as_base(self, config: PTuningConfig) -> bool:
        """Never: the virtual tokens are read like any others."""
        return False

    def base_when_disabled(self, config: PTuningConfig) -> bool:
        return True

    def apply(self, config: PTuningConfig, run: AdapterRun) -> Any:
        """A `PeftModel` with a prompt encoder."""
        from peft import PromptEncoderConfig

        return _peft.wrap(
            run,
            PromptEncoderConfig(
                task_type=run.task_type,
                modules_to_save=_peft.saved_modules(run),
                **config.model_dump(),
            ),
        )


ENTRY: type[Adapter] = PTuning
