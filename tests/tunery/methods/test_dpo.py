"""DPO: by hand, by gradient, by refusal, and step for step against TRL."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig as TrlConfig
from trl import DPOTrainer

from tunery import catalogue
from tunery.errors import InvalidConfig
from tunery.methods.dpo import Dpo, DpoConfig, dpo_loss
from tunery.training.losses import TokenLossComputer
from tunery.training.types import (
    AdapterRun,
    Batch,
    Document,
    EncodeOptions,
    Example,
    MethodRun,
)

STEPS = 4
RATE = 5e-3
BETA = 0.3


def logps(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


def test_a_pair_by_hand() -> None:
    # margin = (-1 - -2) - (-4 - -3) = 1 - -1 = 2; at beta 0.5 the loss is log(1 + e^-1).
    given = [torch.tensor([value]) for value in (-1.0, -4.0, -2.0, -3.0)]
    assert dpo_loss(*given, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    smoothed = dpo_loss(*given, beta=0.5, label_smoothing=0.25).item()
    by_hand = 0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1))
    assert smoothed == pytest.approx(by_hand)


def test_the_untrained_model_loses_log_two() -> None:
    same = torch.tensor([-3.0, -500.0])
    assert torch.allclose(dpo_loss(same, same, same, same, beta=5.0), torch.tensor(math.log(2)))


def test_descent_raises_the_preferred_and_lowers_the_other() -> None:
    chosen, rejected = logps(-1.0, -2.0), logps(-1.0, -1.0)
    reference = torch.tensor([-1.0, -1.0])
    dpo_loss(chosen, rejected, reference, reference, beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad < 0).all()
    assert torch.equal(rejected.grad, -chosen.grad)
    # The pair that is ordered wrongly pulls harder.
    assert chosen.grad[1].abs() > chosen.grad[0].abs()


def test_batches_of_different_shapes_are_refused() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"different shapes: \[\(1,\), \(2,\)\]"):
        dpo_loss(one, two, one, one, beta=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0},
        {"beta": -1},
        {"label_smoothing": 0.5},
        {"loss": "ipo"},
        {"loss_type": "aot"},
        {"loss_type": []},
        {"loss_type": ["sigmoid", "sigmoid"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        {"loss_type": "exo_pair"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DpoConfig(**settings)


def test_a_row_that_is_no_pair_is_refused() -> None:
    single = Example((Document(np.array([1, 2]), np.array([1, 2])),), None, 4)
    objective = Dpo().objective(DpoConfig(), method_run(None, None))
    with pytest.raises(InvalidConfig, match="row 4 is not a pair"):
        objective.units(single)


# ---- against TRL -------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
PAIRS = [
    ("Is it open on Sunday?", "Yes, from ten to four.", "No idea."),
    ("Name a prime.", "Seven.", "Eight is prime, I am quite sure of it."),
    ("Say hi", "Hi!", "Go away"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )
    return fast


def policy(
    adapter: str, tokenizer: PreTrainedTokenizerFast, *, attention_dropout: float = 0.0
) -> Any:
    torch.manual_seed(3)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            attention_dropout=attention_dropout,
        )
    )
    entry = catalogue.find("adapters", adapter)
    model = entry.apply(entry.Config(), AdapterRun(base, "CAUSAL_LM", tokenizer, 0, "example/base"))
    return model


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def method_run(model: Any, base: Any) -> MethodRun:
    return MethodRun(
        task=catalogue.find("tasks", "text-generation").runtime(None),
        token_losses=TokenLossComputer(base) if base is not None else lambda *_: None,  # type: ignore[arg-type,return-value]
        reference=getattr(model, "disable_adapter", None),
        seed=0,
    )


def our_batch(tokenizer: PreTrainedTokenizerFast) -> Batch:
    task = catalogue.find("tasks", "text-generation").runtime(None)
    return task.collate(our_examples(tokenizer), layout="rows", pad_id=tokenizer.pad_token_id)


def our_examples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    task = catalogue.find("tasks", "text-generation").runtime(None)
    rows = [
        {
            "input": {"messages": turn("user", prompt)},
            "preferred_output": turn("assistant", good),
            "non_preferred_output": turn("assistant", bad),
        }
        for prompt, good, bad in PAIRS
    ]
    options = EncodeOptions(format="preference", max_length=128)
    return [task.encode(row, tokenizer, options, i) for i, row in enumerate(rows)]  # type: ignore[misc]


def our_run(model: Any, tokenizer: Any, **settings: Any) -> list[dict[str, float]]:
    """Metrics of each step: the whole file is one batch, plain AdamW at a constant rate."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    objective = Dpo().objective(DpoConfig(beta=BETA, **settings), method_run(model, base))
    batch = our_batch(tokenizer)
    objective.prepare(model, [batch])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    seen = []
    for _ in range(STEPS):
        out = objective.loss(model, batch)
        loss = out.loss / len(PAIRS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values = {name: (total / count).item() for name, (total, count) in out.sums.items()}
        seen.append({"loss": loss.item(), **values})
    return seen


def trl_run(model: Any, tokenizer: Any, folder: Path) -> list[dict[str, float]]:
    trainer = trl_trainer(model, tokenizer, folder)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trl_trainer(model: Any, tokenizer: Any, folder: Path) -> Any:
    rows = [
        {
            "prompt": turn("user", p),
            "chosen": turn("assistant", c),
            "rejected": turn("assistant", r),
        }
        for p, c, r in PAIRS
    ]
    settings = TrlConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(PAIRS),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        beta=BETA,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=model,
        ref_model=None if hasattr(model, "disable_adapter") else copy.deepcopy(model),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_every_step_is_that_of_trl(adapter: str, tokenizer: Any, tmp_path: Path) -> None:
    model = policy(adapter, tokenizer)
    theirs = trl_run(copy.deepcopy(model), tokenizer, tmp_path)
    ours = our_run(model, tokenizer)
    assert [entry["loss"] for entry in ours] == pytest.approx(
        [entry["loss"] for entry in theirs], abs=1e-5
    )
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.01
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert ours[-1][name] == pytest.approx(theirs[-1][name], abs=1e-4)


FAMILY: list[dict[str, Any]] = [
    *(
        {"loss_type": name}
        for name in (
            "sigmoid",
            "hinge",
            "ipo",
            "robust",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
            "discopop",
            "sigmoid_norm",
            "sft",
        )
    ),
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "exo_pair", "label_smoothing": 0.2},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    {"loss_type": ["hinge", "bco_pair", "sft"]},
]


@pytest.mark.filterwarnings("ignore")
def test_every_loss_of_the_family_is_that_of_trl(tokenizer: Any, tmp_path: Path) -> None:
    # Moved after TRL has copied it: an adapter that it is given is its reference.
    trainer = trl_trainer(policy("lora", tokenizer), tokenizer, tmp_path)
    model = moved(policy("lora", tokenizer))
    moved(trainer.model)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch = our_batch(tokenizer)
    for settings in FAMILY:
        names = settings["loss_type"]
        trainer.loss_types = [names] if isinstance(names, str) else names
        trainer.loss_weights = settings.get("loss_weights", [1.0] * len(trainer.loss_types))
        trainer.label_smoothing = settings.get("label_smoothing", 0.0)
        theirs = slopes(trainer.model, trainer.compute_loss(trainer.model, inputs))
        objective = Dpo().objective(DpoConfig(beta=BETA, **settings), run_of(model))
        objective.prepare(model, [batch])
        objective.begin(our_examples(tokenizer))  # type: ignore[attr-defined]
        ours = slopes(model, objective.loss(model, batch).loss / len(PAIRS))
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5, rel=5e-6), settings
        scale = theirs[1].abs().max().item()
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-4 * scale)


def moved(model: Any) -> Any:
    """Away from the reference, so that ratios are not all 0."""
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def slopes(model: Any, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    """A loss and its gradient, flat."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    return loss.item(), torch.cat([part.flatten() for part in parts])


def run_of(model: Any) -> MethodRun:
    return method_run(model, model.get_base_model())


def test_a_mix_does_not_depend_on_how_the_step_is_cut(tokenizer: Any) -> None:
    model = moved(policy("lora", tokenizer))
    config = DpoConfig(loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    objective = Dpo().objective(config, run_of(model))
    examples = our_examples(tokenizer)
    objective.begin(iter(examples))  # type: ignore[attr-defined]
    task = catalogue.find("tasks", "text-generation").runtime(None)

    def total(*parts: list[Example]) -> tuple[float, torch.Tensor]:
        batches = [task.collate(part, layout="rows", pad_id=0) for part in parts]
        return slopes(model, sum(objective.loss(model, batch).loss for batch in batches))  # type: ignore[arg-type]

    whole, cut = total(examples), total(examples[:1], examples[1:])
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-4, atol=1e-5)


def test_a_remembered_reference_gives_the_same_run(tokenizer: Any) -> None:
    asked = our_run(policy("lora", tokenizer), tokenizer)
    remembered = our_run(policy("lora", tokenizer), tokenizer, precompute_ref_log_probs=True)
    assert [e["loss"] for e in asked] == pytest.approx([e["loss"] for e in remembered], abs=1e-6)


def test_dropout_is_off_unless_asked_for(tokenizer: Any) -> None:
    entry = catalogue.find("adapters", "lora")
    model = policy("full", tokenizer)
    run = AdapterRun(model, "CAUSAL_LM", tokenizer, 0, "example/base")
    model = entry.apply(entry.Config(lora_dropout=0.5), run)
    rates = lambda: {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}  # noqa: E731
    objective = Dpo().objective(DpoConfig(disable_dropout=False), method_run(model, None))
    objective.prepare(model, [])
    assert rates() == {0.5}
    Dpo().objective(DpoConfig(), method_run(model, None)).prepare(model, [])
    assert rates() == {0.0}


def test_the_dropout_inside_attention_is_off_too(tokenizer: Any) -> None:
    plain = our_run(policy("lora", tokenizer), tokenizer)
    dropping = our_run(policy("lora", tokenizer, attention_dropout=0.5), tokenizer)
    assert [entry["loss"] for entry in dropping] == [entry["loss"] for entry in plain]


def test_a_reference_is_scored_without_the_dropout_that_the_policy_keeps(tokenizer: Any) -> None:
    plain = our_run(policy("lora", tokenizer), tokenizer)[0]
    model = policy("lora", tokenizer, attention_dropout=0.5)
    kept = our_run(model, tokenizer, disable_dropout=False)[0]
    assert model.training
    assert kept["logps/chosen"] != pytest.approx(plain["logps/chosen"], abs=1e-3)
    reference = kept["logps/chosen"] - kept["rewards/chosen"] / BETA
    assert reference == pytest.approx(plain["logps/chosen"], abs=1e-3)
