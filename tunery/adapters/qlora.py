"""QLoRA: LoRA on a base that is kept in 4 or 8 bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunery.adapters import _peft
from tunery.adapters._loftq import start_from_residual
from tunery.adapters.lora import Lora, LoraConfig
from tunery.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from tunery.entries import Adapter, EntryConfig
    from tunery.training.types import AdapterRun

_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}


class QloraConfig(LoraConfig):
    quantization: Literal["nf4", "fp4", "int8"] = Field(
        "nf4",
        description="How the base's linear modules are kept: 4 bits spaced for normally "
        "distributed weights, 4-bit floats, or 8 bits with outliers apart.",
    )
    double_quantization: bool = Field(
        True, description="Quantise the scales of 4-bit blocks too: 0.4 bits less per weight."
    )
    loftq: bool = Field(
        False,
        description="LoftQ: start A and B from what the quantisation lost of each weight, instead "
        "of from zero. Needs 4 bits.",
    )

    @model_validator(mode="after")
    def _fits_quantised_weights(self) -> QloraConfig:
        if self.init_lora_weights in ("pissa", "olora"):
            raise ValueError("init_lora_weights: pissa and olora change weights; these are fixed")
        if self.loftq and self.quantization == "int8":
            raise ValueError("loftq: needs a quantization of 4 bits")
        if self.loftq and (self.rank_pattern or self.use_dora):
            raise ValueError("loftq: works without rank_pattern and use_dora")
        return self


class Qlora(Lora):
    name: ClassVar[str] = "qlora"
    title: ClassVar[str] = "QLoRA"
    summary: ClassVar[str] = (
        "LoRA on a base in 4 or 8 bits: a quarter or half of the memory for its weights, on a GPU."
    )
    paper: ClassVar[str | None] = (
        "Dettmers et al.: QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv 2305.14314"
    )
    Config: ClassVar[type[EntryConfig]] = QloraConfig
    example: ClassVar[Mapping[str, Any]] = {
        "type": "qlora",
        "r": 16,
        "lora_alpha": 32,
        "quantization": "nf4",
    }
    strategies: ClassVar[frozenset[str] | None] = frozenset({"single", "ddp"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})

    def weight_bytes(self, config: QloraConfig) -> float:
        """Per weight of the base, without the scales of its blocks."""
        return _BYTES[config.quantization]

    def load_options(
        self, config: QloraConfig, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Any]:
        """What `from_pretrained` is told, so that no whole copy of the base is ever on the device.

        Raises:
            NotSupported: another device than a CUDA one, or bitsandbytes is not installed.
        """
        if device.type not in self.devices:
            raise NotSupported(
                f"adapter 'qlora' trains on CUDA devices, and this is {device.type!r}",
                hint="use lora here",
                param="adapter.type",
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise NotSupported(
                "adapter 'qlora' needs bitsandbytes, which is not installed",
                hint="pip install 'tunery[quantize]' on the workers",
                param="adapter.type",
            )
        return {"quantization_config": _quantization(config, dtype), "device_map": {"": device}}

    def starts_as_base(self, config: Any) -> bool:
        """As the quantised base; with LoftQ nearer to the base that was quantised."""
        return not config.loftq

    def apply(self, config: Any, run: AdapterRun) -> Any:
        """A `PeftModel` with LoRA layers over a base that `load_options` loaded.

        Raises:
            InvalidConfig: a target or a module to save is not in the model.
        """
        model = super().apply(config, run)
        if config.loftq:
            start_from_residual(model, Path(str(run.model.name_or_path)))
        return model


def _quantization(config: QloraConfig, dtype: torch.dtype) -> Any:
    """transformers' name for it; heads, which are trained whole, stay as they are."""
    from transformers import BitsAndBytesConfig

    heads = ["lm_head", *_peft.HEADS]
    if config.quantization == "int8":
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_8bit=True, llm_int8_skip_modules=heads
        )
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads,
    )


ENTRY: type[Adapter] = Qlora
