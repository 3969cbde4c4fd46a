"""The model card of an export: what it is, what it came from, how to load it, how to make it again.

A hub shows it as the model's page; `pipeline_tag`, `base_model` and `library_name` are its words.
Nothing of the training data but counts and hashes is in it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml
from peft import PeftModel

from tunery import catalogue

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

AUTO_CLASS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types to the class that loads their base."""
VLLM_MOST_RANK = 512


def model_card(model: nn.Module, manifest: Mapping[str, Any], step: int) -> str:
    """README.md of an export of `model`.

    Args:
        manifest: what stands in the export's `training.json`: spec, features, metrics, counts.
        step: optimizer steps done.
    """
    spec = manifest["spec"]
    name, revision = spec["model"]["name"], spec["model"]["revision"]
    method, adapter, task = (_entry(spec, shelf) for shelf in ("method", "adapter", "task"))
    tuned = isinstance(model, PeftModel)
    head = {
        "base_model": name,
        "library_name": "peft" if tuned else "transformers",
        "pipeline_tag": spec["task"]["type"],
        "tags": ["tunery", spec["method"]["type"], spec["adapter"]["type"]],
    }
    base = f"`{name}`" + (f" at revision `{revision}`" if revision else "")
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---\n",
        f"# {name}, tuned\n",
        f"{base}, trained by {method.title} with {adapter.title} for {task.title.lower()}: "
        f"{step:,} optimizer steps over {manifest['trained_tokens']:,} trained tokens.\n",
        f"## How to load it\n\n```python\n{_code(model, name, revision)}\n```\n",
        f"## Metrics\n\n{_table(('metric', 'value'), _metrics(manifest['metrics']))}\n",
        f"## Data\n\n{_table(('file', 'rows', 'format', 'sha256'), _files(spec['data']))}\n",
        f"## Settings\n\n{_table(('setting', 'value'), _settings(spec))}\n",
        f"## Made with\n\n{_table(('what', 'value'), _machine(manifest['features']))}\n",
        _ENDING,
    ]
    if papers := [entry.paper for entry in (method, adapter, task) if entry.paper]:
        listed = "\n".join(f"- {paper}" for paper in papers)
        parts.append(f"\n## References\n\n{listed}\n")
    return "\n".join(parts)


_ENDING = """\
## How to make it again

`training.json` beside this page holds the whole specification under `spec`, with nothing left to
choose, and its hash. Put it in a file, name the data files, and run `tunery train`.
"""


def vllm_obstacles(model: nn.Module) -> list[str]:
    """Why vLLM would not serve this adapter as it is; empty: it would.

    vLLM takes LoRA alone, of rank 512 at most, without DoRA, biases, modules saved whole or ranks
    that differ between modules (`vllm.lora.peft_helper`).
    """
    if not isinstance(model, PeftModel):
        return []
    config: Any = model.peft_config[model.active_adapter]
    if config.peft_type != "LORA":
        return [f"vLLM serves LoRA adapters; this one is {kind_name(config.peft_type)}"]
    found = {
        f"its rank {config.r} is over {VLLM_MOST_RANK}": config.r > VLLM_MOST_RANK,
        "it uses DoRA": config.use_dora,
        "it trains biases": config.bias != "none",
        "it saves modules whole": bool(config.modules_to_save),
        "its ranks differ between modules": bool(config.rank_pattern or config.alpha_pattern),
        "its initialisation changed the base's weights": str(config.init_lora_weights).startswith(
            ("pissa", "olora", "corda", "loftq")
        ),
    }
    return [why for why, is_so in found.items() if is_so]


def kind_name(peft_type: Any) -> str:
    """PEFT's own are members of an enumeration, registered ones plain strings."""
    return str(getattr(peft_type, "value", peft_type))


def _entry(spec: Mapping[str, Any], part: str) -> Any:
    shelf: Any = f"{part}s"
    return catalogue.find(shelf, spec[part]["type"])


def _code(model: nn.Module, name: str, revision: str | None) -> str:
    pinned = f", revision={revision!r}" if revision else ""
    if not isinstance(model, PeftModel):
        kind = type(model).__name__
        return (
            f"from transformers import AutoTokenizer, {kind}\n\n"
            f'model = {kind}.from_pretrained(".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")'
        )
    base = model.get_base_model()
    config = model.peft_config[model.active_adapter]
    kind = AUTO_CLASS.get(kind_name(config.task_type), type(base).__name__)
    labels = getattr(base.config, "num_labels", None)
    sized = f", num_labels={labels}" if kind.endswith("Classification") else ""
    stock = type(config).__module__.startswith("peft.")
    return (
        ("" if stock else "import tunery.adapters  # PEFT alone does not know this tuner\n")
        + "from peft import PeftModel\n"
        f"from transformers import AutoTokenizer, {kind}\n\n"
        f"base = {kind}.from_pretrained({name!r}{pinned}{sized})\n"
        'model = PeftModel.from_pretrained(base, ".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")'
    )


def _metrics(values: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    return ((name, f"{value:.6g}") for name, value in sorted(values.items()))


def _files(data: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, file in data.items():
        if file is not None:
            yield name, f"{file['rows']:,}", file["format"], f"`{file['sha256']}`"


def _settings(spec: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "seed", str(spec["seed"])
    for part in ("method", "adapter", "task"):
        yield part, spec[part]["type"]
        for key, value in sorted(spec[part]["config"].items()):
            yield f"{part}.{key}", f"`{json.dumps(value)}`"
    for use in spec["transforms"]:
        yield "transform", f"{use['type']} `{json.dumps(use['config'], sort_keys=True)}`"


def _machine(features: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key in ("device", "ranks", "strategy", "precision", "attention", "layout"):
        yield key, str(features[key])
    yield from sorted(features["versions"].items())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
