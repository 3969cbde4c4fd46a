"""MAM: a short prefix in the attention and a wide parallel adapter beside the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from torch.nn import functional

from tunery.training.tuners import _prefixed
from tunery.training.tuners._registry import register

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class MamConfig(PeftConfig):
    """What `adapter_config.json` keeps."""

    num_virtual_tokens: int = field(default=30)
    bottleneck: int = field(default=512)
    scaling: float = field(default=4.0)
    attention_modules: list[str] = field(default_factory=list)
    """A linear module of each attention, whose parent is the attention itself."""
    input_modules: list[str] = field(default_factory=list)
    """A linear module of each feed-forward that reads its input."""
    output_modules: list[str] = field(default_factory=list)
    """The last linear module of each feed-forward."""
    target_modules: list[str] | None = field(default=None)
    """All of these."""
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType("MAM")


class MamLayer(nn.Module, BaseTunerLayer):
    """A linear module that computes what it did; what is new is in the subclasses."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, config: MamConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, name: str, shapes: Any) -> None:
        """Add the adapter's tensors here, where there are any."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's outputs."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        return out

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Neither part is a change of a weight."""
        raise ValueError("MAM cannot be merged")

    def unmerge(self) -> None:
        """See `merge`."""
        raise ValueError("MAM cannot be merged")

    def _active(self, tensors: nn.ModuleDict) -> nn.Module | None:
        """The active adapter's tensors, if it has any and is on."""
        if self.disable_adapters:
            return None
        return next((tensors[name] for name in self.active_adapters if name in tensors), None)


class _Prefix(nn.Module):
    """Keys and values: (kv heads, n, d) each."""

    def __init__(self, heads: int, count: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(heads, count, width).normal_(std=0.02))
        self.values = nn.Parameter(torch.empty(heads, count, width).normal_(std=0.02))


class PrefixLayer(MamLayer):
    """Holds an attention's prefix; the attention asks for it."""

    adapter_layer_names = ("mam_prefix",)

    def __init__(self, base_layer: nn.Module, config: MamConfig) -> None:
        super().__init__(base_layer, config)
        self.mam_prefix = nn.ModuleDict()

    def update_layer(self, name: str, shapes: Any) -> None:
        heads = getattr(shapes, "num_key_value_heads", None) or shapes.num_attention_heads
        width = getattr(shapes, "head_dim", None) or (
            shapes.hidden_size // shapes.num_attention_heads
        )
        self.mam_prefix[name] = _Prefix(heads, self.config.num_virtual_tokens, width)

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the active adapter."""
        found: Any = self._active(self.mam_prefix)
        return None if found is None else (found.keys, found.values)


class InputLayer(MamLayer):
    """Remembers a feed-forward's input until its `ParallelLayer` asks, in the same pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["seen"] = x
        return super().forward(x, *args, **kwargs)


class _Bottleneck(nn.Module):
    """up relu(down x), whose last matrix starts at zero."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, nonlinearity="relu")
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(functional.relu(self.down(x.to(self.down.weight.dtype))))
        return out


class ParallelLayer(MamLayer):
    """Adds the scaled bottleneck of the feed-forward's input to its output."""

    adapter_layer_names = ("mam_parallel",)

    def __init__(self, base_layer: nn.Module, config: MamConfig) -> None:
        super().__init__(base_layer, config)
        self.mam_parallel = nn.ModuleDict()

    def update_layer(self, name: str, shapes: Any) -> None:
        self.mam_parallel[name] = _Bottleneck(shapes.hidden_size, self.config.bottleneck)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(x, *args, **kwargs)
        given = self.__dict__["source"].__dict__.pop("seen")
        found = self._active(self.mam_parallel)
        return out if found is None else out + self.config.scaling * found(given).to(out.dtype)


class MamModel(BaseTuner):
    """Puts the three kinds of layers in and connects them."""

    prefix = "mam_"
    tuner_layer_cls = MamLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own declaration

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
        layer = target
        if not isinstance(layer, MamLayer):
            layer = _kind(current_key, peft_config)(target, peft_config)
            layer._active_adapter = adapter_name
        assert isinstance(layer, MamLayer)
        shapes = self.model.config.get_text_config()
        layer.update_layer(adapter_name, shapes)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        if isinstance(layer, PrefixLayer):
            _prefixed.put(parent, layer.prefix)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        _prefixed.switch_on(model)
        before: InputLayer | None = None
        for module in model.modules():
            if isinstance(module, InputLayer):
                before = module
            elif isinstance(module, ParallelLayer):
                module.__dict__["source"] = before


def _kind(path: str, config: MamConfig) -> type[MamLayer]:
    """What goes over the linear module at `path`."""
    for paths, kind in (
        (config.attention_modules, PrefixLayer),
        (config.input_modules, InputLayer),
        (config.output_modules, ParallelLayer),
    ):
        if path in paths:
            return kind
    raise ValueError(f"{path} is none of the modules that the configuration names")


register("mam", MamConfig, MamModel)
