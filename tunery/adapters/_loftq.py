"""LoftQ's start: the low-rank update makes up for what quantisation lost of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunery.errors import BaseModelUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def start_from_residual(model: Any, folder: Path) -> None:
    """Set A and B of every 4-bit LoRA module so that scaling BA is nearest to W - Q.

    One step of Li et al.: LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models,
    2023, arXiv 2310.08659, for a base that is quantised already. PEFT's own version forgets the
    scaling, and so is right where lora_alpha equals r only.

    Args:
        model: a `PeftModel` over a base loaded from `folder` in 4 bits.

    Raises:
        BaseModelUnavailable: a weight is not among the safetensors files of the folder.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    weights = _Weights(folder, model.get_base_model().base_model_prefix)
    for path, module in model.get_base_model().named_modules():
        quantised: Any = getattr(getattr(module, "base_layer", None), "weight", None)
        if getattr(quantised, "quant_state", None) is None or not hasattr(module, "lora_A"):
            continue
        kept = dequantize_4bit(quantised.data, quantised.quant_state).float()
        lost = weights[f"{path}.weight"].to(kept) - kept
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        scaled = lost / module.scaling["default"]
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
        root = values[: len(a)].sqrt()
        rank = len(root)  # of the weight, where it has less than the adapter
        with torch.no_grad():
            b[:, :rank].copy_(left[:, :rank] * root)
            a[:rank].copy_(root[:, None] * right[:rank])


class _Weights:
    """Tensors of a model's folder by name, read one at a time."""

    def __init__(self, folder: Path, prefix: str) -> None:
        from safetensors import safe_open

        self._prefix = f"{prefix}."
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        # A base that was saved without a head has names without the head model's prefix.
        for known in (name, name.removeprefix(self._prefix)):
            if known in self._files:
                with safe_open(self._files[known], "pt") as file:
                    tensor: Tensor = file.get_tensor(known)
                    return tensor
        raise BaseModelUnavailable(
            f"the base's weight {name!r} is not among its safetensors files",
            hint="import the base model again",
        )
