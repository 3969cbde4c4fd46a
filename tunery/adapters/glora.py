"""GLoRA: weights and biases scaled, shifted and mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunery.adapters._tuner import Tuner, TunerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.adapters._tuner import Linear
    from tunery.entries import Adapter, EntryConfig


class GloraConfig(TunerConfig):
    r: int = Field(8, ge=1, le=1024, description="Rank of the low-rank parts.")
    config_A_B: Literal["lora", "vector", "constant", "none"] = Field(  # noqa: N815 - PEFT's name
        "lora",
        description="Form of what multiplies the weight and of what is added to it.",
    )
    config_C: Literal["lora", "vector", "none"] = Field(  # noqa: N815 - PEFT's name
        "lora",
        description="Form of what carries the weight into the bias, where there is one.",
    )
    config_D_E: Literal["vector", "constant", "none"] = Field(  # noqa: N815 - PEFT's name
        "constant",
        description="Form of what multiplies the bias and of what is added to it.",
    )


class Glora(Tuner):
    name: ClassVar[str] = "glora"
    title: ClassVar[str] = "GLoRA"
    summary: ClassVar[str] = (
        "Scales, shifts and mixes weights and biases by learned low-rank, vector or scalar parts."
    )
    paper: ClassVar[str | None] = (
        "Chavan et al.: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, "
        "2023, arXiv 2306.07967"
    )
    Config: ClassVar[type[EntryConfig]] = GloraConfig
    example: ClassVar[Mapping[str, Any]] = {"type": "glora", "r": 4}
    default_learning_rate: ClassVar[float] = 2e-4
    peft_config: ClassVar[str] = "GloraConfig"
    transposed: ClassVar[bool] = False

    def per_linear(self, config: GloraConfig, linear: Linear) -> int:
        """Parts A and B on the weight; C, D and E where the module has a bias."""
        inputs, outputs = linear.inputs, linear.outputs
        on_weight = {"lora": config.r * (inputs + outputs), "vector": outputs, "constant": 1}
        total = 2 * on_weight.get(config.config_A_B, 0)
        if linear.bias:
            into_bias = {"lora": config.r * (inputs + 1), "vector": inputs}
            on_bias = {"vector": outputs, "constant": 1}
            total += into_bias.get(config.config_C, 0) + 2 * on_bias.get(config.config_D_E, 0)
        return total


ENTRY: type[Adapter] = Glora
