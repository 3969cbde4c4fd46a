"""Which linear modules an adapter sits on: once by formula, once in a real model.

PEFT's rule, on both sides: a target means every module whose path equals it or ends in "." and it.
Unlike PEFT we look only inside the repeated blocks, so that "all-linear" and `dense` leave poolers
and heads alone and a parameter count can be told from `config.json`.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, Literal

from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from tunery.entries import ModelShape

ALL_LINEAR: Literal["all-linear"] = "all-linear"
Targets = Literal["all-linear"] | tuple[str, ...]

_IN_BLOCK = re.compile(r"(?:^|.*\.)(\d+)\.(.+)")
_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")

_BIASED: dict[str, frozenset[str] | None] = {
    "qwen2": frozenset({"q_proj", "k_proj", "v_proj"}),
    "whisper": frozenset(
        f"{at}.{name}"
        for at in ("encoder.self_attn", "decoder.self_attn", "decoder.encoder_attn")
        for name in ("q_proj", "v_proj", "out_proj")
    )
    | {f"{half}.fc{number}" for half in ("encoder", "decoder") for number in (1, 2)},
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "gpt2", "gpt_neox", "phi")
    ),
    **dict.fromkeys(("mpnet", "deberta-v2", "bart", "vit", "wav2vec2", "hubert")),
    "audio-spectrogram-transformer": None,
}
"""Families whose block linears have biases: which of them, None for all."""


def check_names(names: Iterable[str], field: str) -> None:
    """Refuse what is not a dotted module name: a target is never a regular expression here.

    Raises:
        ValueError: names the first that is not.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{field}: {name!r} is not a module's name")


def matches(path: str, target: str) -> bool:
    """PEFT's rule for a single target; `path` may itself be the tail of a longer path."""
    return path == target or path.endswith("." + target)


def in_block(path: str) -> bool:
    """Whether a module or parameter lies in one of the repeated blocks."""
    return _IN_BLOCK.fullmatch(path) is not None


def linears_of(shape: ModelShape, targets: Targets) -> dict[str, tuple[int, int]]:
    """The targeted linear modules of one block: name to (in, out) features.

    Raises:
        InvalidConfig: the shape names no linears, or a target is none of them.
    """
    known = shape.linear_shapes
    if not known:
        raise InvalidConfig(
            f"the linear modules of {shape.model_type!r} are not known",
            code="unsupported_architecture",
            param="target_modules",
        )
    if targets == ALL_LINEAR:
        return dict(known)
    for target in targets:
        if not any(matches(name, target) or matches(target, name) for name in known):
            near = difflib.get_close_matches(target, known, n=1)
            raise InvalidConfig(
                f"target_modules: {shape.architecture} has no linear module {target!r}",
                hint=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}",
                param="target_modules",
            )
    return {
        name: sizes
        for name, sizes in known.items()
        if any(matches(name, target) or matches(target, name) for target in targets)
    }


def has_bias(shape: ModelShape, linear: str) -> bool:
    """Whether the base's linear module of that name adds a bias."""
    if shape.model_type not in _BIASED:
        return False
    only = _BIASED[shape.model_type]
    return only is None or linear in only


def layers_of(shape: ModelShape, chosen: Sequence[int] | None) -> list[int]:
    """The block indices that an adapter sits in.

    Raises:
        InvalidConfig: an index that the model does not have.
    """
    count = shape.num_hidden_layers
    if chosen is None:
        return list(range(count))
    if any(index >= count for index in chosen):
        raise InvalidConfig(
            f"layers_to_transform: {max(chosen)} is past the last layer, {count - 1}",
            param="layers_to_transform",
        )
    return sorted(set(chosen))


def by_pattern(patterns: Mapping[str, int], layer: int, linear: str) -> int | None:
    """The value of the first pattern that names this linear of this layer.

    A pattern is a module name, or a path from the block's number on: `down_proj`,
    `layers.0.mlp.down_proj`.
    """
    for pattern, value in patterns.items():
        block = _IN_BLOCK.fullmatch(pattern)
        if block is None:
            if matches(linear, pattern) or matches(pattern, linear):
                return value
        elif int(block[1]) == layer and matches(block[2], linear):
            return value
    return None


def targets_in(model: nn.Module, targets: Targets) -> list[str]:
    """Target names for PEFT that pick the same modules in `model` that `linears_of` counts.

    The shortest names that pick nothing else: vLLM and others read `q_proj`, not paths.

    Raises:
        InvalidConfig: nothing matches.
    """
    inside, outside = _linear_paths(model)
    wanted = {
        path
        for path, tail in inside.items()
        if targets == ALL_LINEAR or any(matches(path, t) or matches(t, tail) for t in targets)
    }
    if not wanted:
        raise InvalidConfig(
            "target_modules: no linear module of the model has such a name",
            hint=f"known: {', '.join(sorted(set(inside.values())))}",
            param="target_modules",
        )
    rest = (set(inside) - wanted) | outside
    return sorted({_shortest(path, rest) for path in wanted})


def paths_by_tail(model: nn.Module, tail: str) -> list[str]:
    """Paths of the linear modules that lie at `tail` inside their block."""
    inside, _ = _linear_paths(model)
    return [path for path, known in inside.items() if known == tail]


def sizes_in(model: nn.Module, targets: Sequence[str]) -> list[tuple[str, int, int, bool]]:
    """Path, in and out features and whether there is a bias, of each module that PEFT would pick.

    `targets` are names as `targets_in` gives them.
    """
    return [
        (path, *_features(module), module.bias is not None)
        for path, module in model.named_modules()
        if any(matches(path, target) for target in targets)
    ]


def _features(module: Any) -> tuple[int, int]:
    """In and out features, also of GPT-2's transposed linears."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    inputs, outputs = module.weight.shape
    return inputs, outputs


def _shortest(path: str, rest: set[str]) -> str:
    """The shortest tail of `path` that ends none of `rest`; the whole path if there is none."""
    parts = path.split(".")
    for n in range(1, len(parts)):
        tail = ".".join(parts[-n:])
        if not any(matches(other, tail) for other in rest):
            return tail
    return path


def _linear_paths(model: nn.Module) -> tuple[dict[str, str], set[str]]:
    """Linear modules: those in blocks with their path inside the block, and the others."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    inside: dict[str, str] = {}
    outside: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        block = _IN_BLOCK.fullmatch(path)
        if block is None:
            outside.add(path)
        else:
            inside[path] = block[2]
    return inside, outside
