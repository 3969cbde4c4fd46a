"""What every adapter has to keep, tried on tiny random models. New entries are collected here.

All cases are saved first and loaded back by one fresh process, since importing torch takes longer
than everything else here.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from tunery import catalogue
from tunery.adapters._tuner import Tuner
from tunery.adapters.full import Full
from tunery.entries import InCache, Loads, Rated, Stepping
from tunery.errors import InvalidConfig
from tunery.models.shape import shape_of
from tunery.training.checkpoint import export_writer
from tunery.training.hooks import StepsRun
from tunery.training.optimizer import Optimizer, OptimizerSettings
from tunery.training.types import AdapterRun

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adalora": [{"target_r": 2, "init_r": 4, "tinit": 4, "tfinal": 6, "deltaT": 3}],
    "child_tuning": [{"mode": "fisher", "share": 0.3, "fisher_steps": 2}],
    "lora": [
        {"r": 4, "lora_dropout": 0.5, "use_rslora": True, "target_modules": ["q_proj", "value"]},
        {"r": 4, "use_dora": True},
        {"r": 4, "init_lora_weights": "gaussian"},
        {"r": 4, "init_lora_weights": "orthogonal"},
        {"r": 4, "init_lora_weights": "pissa"},
        {"r": 4, "init_lora_weights": "olora"},
        {"r": 4, "bias": "lora_only"},
        {"r": 4, "layers_to_transform": [1]},
        {"r": 4, "lr_ratio": 4},
    ],
    "ia3": [],
    "prompt": [{"num_virtual_tokens": 3, "init": "random"}],
    "p_tuning": [
        {
            "num_virtual_tokens": 3,
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 8,
        }
    ],
    "prefix": [{"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}],
}
"""Settings beside the example that have their own arithmetic."""

REFUSED = {
    ("bitfit", "llama"): "no biases to train",
    ("bitfit", "llama-classifier"): "no biases to train",
}
"""Models that an entry cannot train, and what it says of them."""

LABELS = 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
LLAMA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
BERT = {**SIZES, "num_attention_heads": 4, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA), "text-generation"),
    "llama-classifier": (
        LlamaForSequenceClassification,
        LlamaConfig(**LLAMA, num_labels=LABELS),
        "text-classification",
    ),
    "bert-classifier": (
        BertForSequenceClassification,
        BertConfig(**BERT, num_labels=LABELS),
        "text-classification",
    ),
}


@dataclass(frozen=True)
class Case:
    adapter: str
    model: str
    settings: str

    @property
    def entry(self) -> Any:
        return catalogue.find("adapters", self.adapter)

    @property
    def config(self) -> Any:
        return self.entry.Config.model_validate(json.loads(self.settings))

    @property
    def is_one_of_many(self) -> bool:
        """Entries over PEFT's tuners share their code: one model tells enough, the rest is slow."""
        return isinstance(self.entry, Tuner) and self.model != "llama"

    @property
    def folder(self) -> str:
        return f"{CASES.index(self):03d}"

    def __str__(self) -> str:
        return f"{self.adapter}-{self.model}-{self.settings}"


def _cases() -> list[Case]:
    cases = []
    for name, entry in catalogue.entries("adapters").items():
        if isinstance(entry, Loads):
            continue  # wants a device and a base of its own
        example = {key: value for key, value in entry.example.items() if key != "type"}
        for settings in [example, *VARIANTS.get(name, [])]:
            for model, (_, _, task) in MODELS.items():
                targets = settings.get("target_modules")
                if isinstance(targets, list) and "llama" not in model:
                    settings = {**settings, "target_modules": ["value"]}
                elif isinstance(targets, list):
                    settings = {**settings, "target_modules": ["q_proj"]}
                fits = entry.tasks is None or task in entry.tasks
                if fits and (name, model) not in REFUSED:
                    cases.append(Case(name, model, json.dumps(settings)))
    return cases


CASES = _cases()
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case.is_one_of_many else case for case in CASES],
    ids=str,
)


def base_model(name: str) -> PreTrainedModel:
    cls, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():  # biases of zero would hide what multiplies them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def adapted(case: Case) -> Any:
    return applied(case, base_model(case.model))


def applied(case: Case, model: PreTrainedModel) -> Any:
    task_type = "CAUSAL_LM" if case.model == "llama" else "SEQ_CLS"
    run = AdapterRun(model, task_type, None, 7, "example/base")
    return case.entry.apply(case.config, run)


@cache
def fresh(case: Case) -> Any:
    """Adapted, once: to be looked at, not changed."""
    return adapted(case)


@cache
def base_answers(name: str) -> torch.Tensor:
    """What the base says."""
    return answers(Case("full", name, "{}"), base_model(name))


@cache
def base_names(name: str) -> frozenset[str]:
    """What the base calls its tensors."""
    return frozenset(base_model(name).state_dict())


def batch(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (4, 10), generator=generator)
    labels = ids if case.model == "llama" else torch.arange(4) % LABELS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def answers(case: Case, model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(**batch(case)).logits
    return out[:, -10:] if out.dim() == 3 else out


STEPS = 20


@cache
def trained(case: Case) -> tuple[Any, list[float]]:
    """The model after some steps of the trainer's optimizer, and the loss before each and after."""
    model = adapted(case)
    hook = (
        case.entry.hook(case.config, StepsRun(model, STEPS, seed=7))
        if isinstance(case.entry, Stepping)
        else None
    )
    settings = OptimizerSettings(
        learning_rate=max(case.entry.default_learning_rate, 5e-3),
        schedule="constant",
        warmup_steps=0,
        total_steps=STEPS,
        max_grad_norm=0.0,
        rate=partial(case.entry.rate, case.config) if isinstance(case.entry, Rated) else None,
        hook=hook,
    )
    optimizer = Optimizer(model.named_parameters(), settings)
    torch.manual_seed(2)
    for _ in range(hook.calibration_steps if hook else 0):
        model(**batch(case)).loss.backward()
        optimizer.calibrate()
    losses = []
    for step in range(STEPS + 1):
        model.train(step < STEPS)
        loss = model(**batch(case)).loss
        losses.append(loss.item())
        if step < STEPS:
            loss.backward()
            optimizer.step()
    return model, losses


def may_rest(name: str, parameter: torch.Tensor) -> bool:
    """Attention does not see what is added to all keys; AdaLoRA may take all of a module's rank."""
    return ".key.glora_C." in name or (".lora_E." in name and not parameter.any())


def is_whole(case: Case) -> bool:
    """Whether the model itself trains, without PEFT."""
    return isinstance(case.entry, Full)


def free_base_tensors(case: Case) -> set[str]:
    """Those of the base's own tensors that train, by the base's names."""
    trained = (name for name, p in fresh(case).named_parameters() if p.requires_grad)
    return {plain(name.removeprefix("base_model.model.")) for name in trained} & base_names(
        case.model
    )


def plain(name: str) -> str:
    """A parameter's name as the base has it."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def base_tensors(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Clones of what the base brought, by the base's own names: no adapter tensors, no copies."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    known = base_names(name)
    found = {}
    for path, tensor in model.state_dict().items():
        if plain(path) in known and "modules_to_save" not in path:
            found[plain(path)] = tensor.clone()
    assert found.keys() == known
    return found


@pytest.mark.parametrize("name", catalogue.entries("adapters"))
def test_every_field_says_what_it_means(name: str) -> None:
    schema = catalogue.describe("adapters", name)["schema"]
    silent = [k for k, v in schema.get("properties", {}).items() if not v.get("description")]
    assert silent == []
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(("name", "model"), REFUSED)
def test_a_model_that_it_cannot_train_is_refused_by_shape_and_by_model(
    name: str, model: str
) -> None:
    entry = catalogue.find("adapters", name)
    config = entry.Config()
    shape = shape_of(MODELS[model][1].to_dict())
    with pytest.raises(InvalidConfig, match=REFUSED[name, model]):
        entry.trainable_parameters(config, shape)
    run = AdapterRun(base_model(model), "CAUSAL_LM", None, 7, "example/base")
    with pytest.raises(InvalidConfig, match=REFUSED[name, model]):
        entry.apply(config, run)


def test_the_shelf_is_read_without_torch() -> None:
    code = (
        "import sys; from tunery import catalogue\n"
        "for name in catalogue.entries('adapters'): catalogue.describe('adapters', name)\n"
        "print(sorted({'torch', 'peft', 'transformers'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@every_case
def test_only_the_promised_parameters_train(case: Case) -> None:
    _, config, _ = MODELS[case.model]
    model = fresh(case)
    total = sum(p.numel() for p in base_model(case.model).parameters())
    labels = None if case.model == "llama" else LABELS
    shape = shape_of(config.to_dict(), parameters=total).model_copy(update={"num_labels": labels})
    if labels is not None:  # a base's own count has no classification head
        head = 32 * LABELS + (LABELS if "bert" in case.model else 0)
        shape = shape.model_copy(update={"parameters": total - head})
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == case.entry.trainable_parameters(case.config, shape)


@every_case
def test_a_fresh_adapter_answers_as_the_base_where_it_says_so(case: Case) -> None:
    said, base = answers(case, fresh(case)), base_answers(case.model)
    if case.entry.starts_as_base(case.config):
        torch.testing.assert_close(said, base, atol=1e-5, rtol=1e-5)
    else:
        assert not torch.allclose(said, base, atol=1e-7, rtol=0)


@every_case
def test_the_seed_alone_decides_the_start_and_other_draws_stay(case: Case) -> None:
    # Made first: to build a base takes a seed of its own.
    base, first = base_model(case.model), fresh(case).state_dict()
    torch.manual_seed(100)
    before = torch.get_rng_state()
    second = applied(case, base).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_case
def test_training_lowers_the_loss_and_leaves_the_rest_alone(case: Case) -> None:
    model, losses = trained(case)
    assert losses[-1] < losses[0] - 1e-3
    if is_whole(case):
        return
    before = base_tensors(fresh(case), case.model)
    after = base_tensors(model, case.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= free_base_tensors(case)
    assert all(name.endswith("bias") for name in moved)
    start = dict(fresh(case).named_parameters())
    stuck = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and torch.equal(parameter, start[name])
        if not may_rest(name, parameter)
    ]
    assert stuck == []


def gradients(case: Case, *, recompute: bool) -> dict[str, torch.Tensor]:
    """Of one pass, by parameter name, dropout included."""
    model = adapted(case)
    base = model if is_whole(case) else model.get_base_model()
    base.config.use_cache = False
    if recompute:
        base.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    model.train()(**batch(case)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not (case.is_one_of_many or isinstance(case.entry, InCache))],
    ids=str,
)
def test_recomputing_activations_changes_no_gradient(case: Case) -> None:
    kept, recomputed = gradients(case, recompute=False), gradients(case, recompute=True)
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", [case for case in CASES if case.model == "llama"], ids=str)
def test_switched_off_it_is_the_base_where_it_says_so(case: Case) -> None:
    promised = case.entry.base_when_disabled(case.config)
    if is_whole(case) or free_base_tensors(case) or getattr(case.config, "bias", "none") != "none":
        assert not promised  # cannot be switched off; PEFT itself warns of trained biases
        return
    model, _ = trained(case)
    with model.disable_adapter():
        off = answers(case, model)
    same = torch.allclose(off, base_answers(case.model), atol=1e-6)
    assert same is promised


@every_case
def test_merged_weights_answer_alike(case: Case) -> None:
    if not case.entry.mergeable:
        pytest.skip("not mergeable")
    model = adapted(case)
    model.load_state_dict(trained(case)[0].state_dict())
    expected = answers(case, model)
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(answers(case, merged), expected, atol=1e-4, rtol=1e-4)


LOAD = """
import json, sys, torch, warnings
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
import tunery.adapters
for line in json.loads(Path(sys.argv[1]).read_text()):
    auto = AutoModelForCausalLM if line["model"] == "llama" else AutoModelForSequenceClassification
    if line["whole"]:
        model = auto.from_pretrained(line["folder"])
    else:
        model = PeftModel.from_pretrained(auto.from_pretrained(line["base"]), line["folder"])
    batch = torch.load(line["batch"])
    del batch["labels"]  # an AdaLoRA that was loaded to be used has no loss
    with torch.no_grad():
        torch.save(model.eval()(**batch).logits, line["answer"])
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with the answers of every case here, given by models loaded in a fresh process."""
    mine = test_a_fresh_process_loads_it_and_answers_alike.__name__
    chosen = {
        item.callspec.params["case"]
        for item in request.session.items
        if getattr(item, "originalname", None) == mine
    }
    root = tmp_path_factory.mktemp("adapters")
    for name in MODELS:
        base_model(name).save_pretrained(root / name)
    lines = []
    for case in sorted(chosen, key=CASES.index):
        folder = root / case.folder
        folder.mkdir()
        model, _ = trained(case)
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        export_writer(model, weights)(folder)
        torch.save(batch(case), root / f"{case.folder}.batch")
        lines.append(
            {
                "whole": is_whole(case),
                "model": case.model,
                "base": str(root / case.model),
                "folder": str(folder),
                "batch": str(root / f"{case.folder}.batch"),
                "answer": str(root / f"{case.folder}.answer"),
            }
        )
    (root / "cases.json").write_text(json.dumps(lines))
    subprocess.run([sys.executable, "-c", LOAD, str(root / "cases.json")], check=True)
    return root


@every_case
def test_a_fresh_process_loads_it_and_answers_alike(case: Case, reloaded: Path) -> None:
    answer = torch.load(reloaded / f"{case.folder}.answer")
    answer = answer[:, -10:] if answer.dim() == 3 else answer
    torch.testing.assert_close(answer, answers(case, trained(case)[0]), atol=1e-5, rtol=1e-5)
    if not is_whole(case):
        saved = json.loads((reloaded / case.folder / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == "example/base"
