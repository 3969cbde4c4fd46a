"""ProPETL: one small network for all layers, of which each layer uses a part of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from tunery.training.tuners._registry import register

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PropetlConfig(PeftConfig):
    """What `adapter_config.json` keeps."""

    bottleneck: int = field(default=64)
    kept: float = field(default=0.5)
    activation: str = field(default="relu")
    target_modules: list[str] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType("PROPETL")


class _Prototype(nn.Module):
    """The network that the layers share: down (m, d), up (d, m), and their biases."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, width).normal_(std=0.02))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(torch.zeros(width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(width))


class _Scores(nn.Module):
    """A layer's: the larger an entry's score, the sooner the layer uses it."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.up = nn.Parameter(torch.empty(width, bottleneck))
        for scores in (self.down, self.up):
            nn.init.kaiming_uniform_(scores, a=math.sqrt(5))


class _Largest(torch.autograd.Function):
    """1 at the largest entries and 0 elsewhere; gradients pass as if it were the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: float) -> Tensor:
        return largest(scores, kept).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def largest(scores: Tensor, kept: float) -> Tensor:
    """A mask of exactly round(kept * n) of the n scores, at least 1: bool, in their shape."""
    count = max(1, round(kept * scores.numel()))
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.detach().flatten().topk(count).indices] = True
    return mask.view(scores.shape)


class PropetlLayer(nn.Module, BaseTunerLayer):
    """A linear module whose outputs h become h + up f(down h), with the layer's masks on both."""

    adapter_layer_names = ("propetl_prototype", "propetl_scores")
    other_param_names = ("kept", "activation")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.propetl_prototype = nn.ModuleDict()
        self.propetl_scores = nn.ModuleDict()
        self.kept: dict[str, float] = {}
        self.activation: dict[str, Any] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, name: str, config: PropetlConfig, prototype: Any) -> None:
        """Add an adapter that uses the given prototype."""
        self.propetl_prototype[name] = prototype
        width = prototype.up.shape[0]
        self.propetl_scores[name] = _Scores(width, config.bottleneck)
        self.kept[name] = config.kept
        self.activation[name] = ACT2FN[config.activation]
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's outputs (..., d), adapted."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.propetl_scores:
                out = self._adapted(out, name)
        return out

    def _adapted(self, out: Tensor, name: str) -> Tensor:
        whole: Any = self.propetl_prototype[name]
        scores: Any = self.propetl_scores[name]
        kept = self.kept[name]
        down = whole.down * _Largest.apply(scores.down, kept)  # type: ignore[no-untyped-call]
        up = whole.up * _Largest.apply(scores.up, kept)  # type: ignore[no-untyped-call]
        given = out.to(down.dtype)
        inner = self.activation[name](functional.linear(given, down, whole.down_bias))
        return out + functional.linear(inner, up, whole.up_bias).to(out.dtype)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """What a layer adds is not linear in its input."""
        raise ValueError("ProPETL cannot be merged")

    def unmerge(self) -> None:
        """See `merge`."""
        raise ValueError("ProPETL cannot be merged")


class PropetlModel(BaseTuner):
    """Puts the layers in, all over one prototype."""

    prefix = "propetl_"
    tuner_layer_cls = PropetlLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own declaration
    uses_shared_state = True

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, PropetlLayer) else target
        prototype = self._prototype(peft_config, adapter_name, width_of(base))
        if isinstance(target, PropetlLayer):
            target.update_layer(adapter_name, peft_config, prototype)
            return
        layer = PropetlLayer(target)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, prototype)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _prototype(self, config: Any, name: str, width: int) -> nn.Module:
        for module in self.model.modules():
            if isinstance(module, PropetlLayer) and name in module.propetl_prototype:
                return module.propetl_prototype[name]
        return _Prototype(width, config.bottleneck)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The prototype once, and masks of a byte an entry instead of scores."""
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        first: dict[str, str] = {}
        out: dict[str, Tensor] = {}
        for key, tensor in found.items():
            if ".propetl_prototype." in key:
                part = key.rpartition(".propetl_prototype.")[2]
                if first.setdefault(part, key) != key:
                    continue
            out[key] = largest(tensor, config.kept) if ".propetl_scores." in key else tensor
        return out

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Masks as scores of 0 and 1, which choose alike; the prototype for each layer."""
        out = {}
        prototypes = {k: v for k, v in state_dict.items() if ".propetl_prototype." in k}
        for key, tensor in state_dict.items():
            if ".propetl_scores." not in key:
                out[key] = tensor
                continue
            out[key] = tensor.float()
            layer = key.rpartition(".propetl_scores.")[0]
            for other, value in prototypes.items():
                part = other.rpartition(".propetl_prototype.")[2]
                out[f"{layer}.propetl_prototype.{part}"] = value
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, out
        )
        return remapped


def width_of(linear: Any) -> int:
    """Out features of a linear module, also of GPT-2's transposed ones."""
    size = linear.out_features if hasattr(linear, "out_features") else linear.weight.shape[1]
    return int(size)


register("propetl", PropetlConfig, PropetlModel)
