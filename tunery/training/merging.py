"""A base model and its adapter as one model, checked against the two.

The weights stay in the base's own precision, in which the adapter's change is rounded: how much of
it is lost is measured on the logits and written down, for a merge that quietly spoils a model is
found by its users otherwise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer

from tunery.errors import BaseModelUnavailable, CheckpointCorrupt, UnsupportedCombination
from tunery.training.card import AUTO_CLASS, kind_name
from tunery.training.checkpoint import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MERGED = "merge.json"
SHARD = "2GB"
_ROWS, _TOKENS = 4, 32
MUCH_LOST = 0.1
"""Share of the adapter's effect beyond which a merge is worth a warning."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How the merged model's logits differ from those of base and adapter, on random tokens.

    Attributes:
        dtype: of the merged weights, which is the base's.
        max_difference: largest absolute difference of a logit.
        lost: root mean square of the differences over that of the adapter's own effect on the
            logits; 0 is exact, 1 means that nothing of the adapter is left. 0 where the adapter
            has no effect.
        same_top: share of positions whose most likely token (or class) is the same.
    """

    dtype: str
    max_difference: float
    lost: float
    same_top: float


@torch.no_grad()
def merge(base: Path, export: Path, into: Path) -> MergeReport:
    """Write base and adapter as one model to the new folder `into`; a report lies in `merge.json`.

    Files are written shard by shard, of 2 GB at most; the base is in memory once.

    Raises:
        BaseModelUnavailable: the base cannot be loaded.
        CheckpointCorrupt: the export cannot be loaded onto it, or the result is not finite.
        UnsupportedCombination: an adapter that cannot be merged.
    """
    model = _load(base, export)
    inputs = _inputs(model)
    tuned = _logits(model, inputs)
    with model.disable_adapter():
        plain = _logits(model, inputs)
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError) as error:
        kind = kind_name(model.peft_config[model.active_adapter].peft_type)
        raise UnsupportedCombination(
            f"a {kind} adapter cannot be merged into its base",
            hint="load the base, then the adapter with PeftModel.from_pretrained",
        ) from error
    except ValueError as error:  # PEFT's word for weights that are not finite
        raise CheckpointCorrupt("merging gives weights that are not finite") from error
    report = _compare(merged, _logits(merged, inputs), tuned, plain)
    merged.save_pretrained(into, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(export, local_files_only=True).save_pretrained(into)
    write_json(into / MERGED, asdict(report))
    return report


def _load(base: Path, export: Path) -> PeftModel:
    try:
        config = PeftConfig.from_pretrained(str(export), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointCorrupt(
            f"{export.name} holds no adapter that can be read ({type(error).__name__})",
            hint="name the folder with adapter_config.json; a full model needs no merging",
        ) from error
    kind = AUTO_CLASS.get(kind_name(config.task_type))
    if kind is None:
        raise UnsupportedCombination(f"adapters for {config.task_type} tasks cannot be merged")
    # The labels, where there are any, stand in the export's own config.
    own = export if (export / "config.json").exists() else base
    try:
        model = getattr(transformers, kind).from_pretrained(
            base,
            config=AutoConfig.from_pretrained(own, local_files_only=True),
            dtype=_stored_dtype(base),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise BaseModelUnavailable(
            f"the base model cannot be loaded ({type(error).__name__})",
            hint="name the folder of the base that the adapter was trained on",
        ) from error
    try:
        tuned = PeftModel.from_pretrained(model, str(export), config=config)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointCorrupt(
            f"the adapter does not fit the base ({type(error).__name__})",
            hint="name the folder of the base that the adapter was trained on",
        ) from error
    return tuned.eval()


def _stored_dtype(base: Path) -> torch.dtype:
    """That of the base's files, whatever its config says of them."""
    from safetensors import safe_open

    first = min(base.glob("*.safetensors"), default=None)
    if first is None:
        raise BaseModelUnavailable("the base model's folder holds no safetensors")
    with safe_open(first, framework="pt") as file:
        found = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118 - no mapping
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(max(set(found), key=found.count), torch.float32)


def _inputs(model: PeftModel) -> dict[str, Tensor]:
    """Random tokens, the same ones every time."""
    draw = torch.Generator().manual_seed(0)
    config: Any = model.get_base_model().config
    vocabulary = int(config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (_ROWS, _TOKENS), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : _TOKENS // 2]
    return inputs


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Whatever comes first out of the model, float32, flat but for the last axis."""
    out = model(**inputs)[0].float()
    return out.reshape(-1, out.shape[-1])  # type: ignore[no-any-return]


def _compare(merged: Any, now: Tensor, tuned: Tensor, plain: Tensor) -> MergeReport:
    if not bool(now.isfinite().all()):
        raise CheckpointCorrupt("the merged model's logits are not finite")
    effect = (tuned - plain).square().mean().sqrt()
    rest = (now - tuned).square().mean().sqrt()
    return MergeReport(
        dtype=str(merged.dtype).removeprefix("torch."),
        max_difference=float((now - tuned).abs().max()),
        lost=float(rest / effect) if effect > 0 else 0.0,
        same_top=float((now.argmax(-1) == tuned.argmax(-1)).float().mean()),
    )


def read_report(folder: Path) -> MergeReport:
    """What `merge` wrote beside a merged model."""
    return MergeReport(**json.loads((folder / MERGED).read_text("utf-8")))
