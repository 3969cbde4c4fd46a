"""What adapters do in each optimizer step, against PEFT's own optimizers and loops."""

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tunery.adapters.adalora import Adalora, AdaloraConfig
from tunery.adapters.child_tuning import ChildTuning, ChildTuningConfig
from tunery.adapters.lora import Lora
from tunery.adapters.lora import LoraConfig as OurLoraConfig
from tunery.adapters.lora_fa import LoraFa, LoraFaConfig
from tunery.errors import InvalidConfig
from tunery.training.hooks import StepsRun
from tunery.training.optimizer import Optimizer, OptimizerSettings
from tunery.training.types import AdapterRun

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    vocab_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
)
IDS = torch.randint(1, 64, (4, 10), generator=torch.Generator().manual_seed(1))


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def run_on(model: Any) -> AdapterRun:
    return AdapterRun(model, "CAUSAL_LM", None, 7, "example/base")  # type: ignore[arg-type]


def settings(steps: int, **more: Any) -> OptimizerSettings:
    return OptimizerSettings(
        **{
            "learning_rate": 1e-2,
            "schedule": "constant",
            "warmup_steps": 0,
            "total_steps": steps,
            "max_grad_norm": 0.0,
            **more,
        }
    )


def loss_of(model: Any) -> Tensor:
    """Without the model's own loss, to which PEFT may add."""
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    mine, other = trained(ours), trained(theirs)
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], atol=tolerance, rtol=1e-5)


def test_lora_plus_updates_as_pefts_optimizer_does() -> None:
    config = OurLoraConfig(r=4, lora_alpha=8, lr_ratio=16)
    ours = Lora().apply(config, run_on(base()))
    theirs = Lora().apply(config, run_on(base()))
    optimizer = Optimizer(
        ours.named_parameters(),
        settings(5, rate=lambda name: Lora().rate(config, name), epsilon=1e-4),
    )
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, eps=1e-4
    )
    for _ in range(5):
        loss_of(ours).backward()
        optimizer.step()
        reference.zero_grad()
        loss_of(theirs).backward()
        reference.step()
    assert_same(ours, theirs, tolerance=1e-5)


def test_lora_fa_updates_as_pefts_optimizer_does_but_for_its_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    config = LoraFaConfig(r=4, lora_alpha=8)
    ours = LoraFa().apply(config, run_on(base()))
    theirs = LoraFa().apply(config, run_on(base()))
    hook = LoraFa().hook(config, StepsRun(ours, 5, 7))
    optimizer = Optimizer(ours.named_parameters(), settings(5, hook=hook, epsilon=1e-12))
    reference = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-2)
    reference.param_groups[0]["eps"] = 1e-12  # it is added before the bias correction there
    for _ in range(5):
        loss_of(ours).backward()
        optimizer.step()
        reference.zero_grad()
        loss_of(theirs).backward()
        reference.step()
    assert not any("lora_A" in name for name in trained(ours))
    assert_same(ours, theirs, tolerance=1e-5)


ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "tinit": 2, "tfinal": 3, "deltaT": 2}


def test_adalora_moves_its_ranks_as_pefts_documented_loop_does() -> None:
    steps = 12
    ours = Adalora().apply(AdaloraConfig(**ADALORA), run_on(base()))
    targets = ours.peft_config["default"].target_modules
    torch.manual_seed(7)
    theirs = get_peft_model(
        base(),
        AdaLoraConfig(
            task_type="CAUSAL_LM",
            target_modules=targets,
            total_step=steps,
            lora_dropout=0,
            **ADALORA,
        ),
    )
    theirs.load_state_dict(ours.state_dict())
    hook = Adalora().hook(AdaloraConfig(**ADALORA), StepsRun(ours, steps, 7))
    optimizer = Optimizer(ours.named_parameters(), settings(steps, hook=hook))
    reference = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    for step in range(1, steps + 1):
        loss_of(ours).backward()
        optimizer.step()
        reference.zero_grad()
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        reference.step()
        theirs.base_model.update_and_allocate(step)
    assert_same(ours, theirs, tolerance=1e-5)
    ranks = [int((p != 0).sum()) for n, p in ours.named_parameters() if ".lora_E." in n]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1


def test_adalora_needs_steps_to_take_ranks_away_in() -> None:
    config = AdaloraConfig(tinit=3, tfinal=2)
    model = Adalora().apply(config, run_on(base()))
    with pytest.raises(InvalidConfig, match="none of the run's 5 steps"):
        Adalora().hook(config, StepsRun(model, 5, 7))
    with pytest.raises(ValueError, match="only taken away"):
        AdaloraConfig(init_r=4, target_r=5)


def test_a_hook_remembers_over_a_resume() -> None:
    """AdaLoRA's importances and pattern, halfway between two allocations."""

    def start() -> tuple[Any, Optimizer]:
        model = Adalora().apply(AdaloraConfig(**ADALORA), run_on(base()))
        hook = Adalora().hook(AdaloraConfig(**ADALORA), StepsRun(model, 12, 7))
        return model, Optimizer(model.named_parameters(), settings(12, hook=hook))

    def go(model: Any, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            loss_of(model).backward()
            optimizer.step()

    whole, first = start()
    go(whole, first, 5)
    kept = first.state()
    go(whole, first, 7)
    resumed, second = start()
    second.load(kept, 5)
    go(resumed, second, 7)
    assert_same(resumed, whole, tolerance=0)
    pattern = whole.peft_config["default"].rank_pattern
    assert resumed.peft_config["default"].rank_pattern == pattern is not None


def child(mode: str, **more: Any) -> tuple[Any, Any]:
    config = ChildTuningConfig(mode=mode, **more)  # type: ignore[arg-type]
    model = ChildTuning().apply(config, run_on(base()))
    return model, ChildTuning().hook(config, StepsRun(model, 4, 7))


def test_child_tuning_free_keeps_a_share_of_the_gradient_and_scales_it() -> None:
    _, hook = child("free", share=0.25)
    gradients = {"a": torch.ones(200, 200), "b": torch.full((100,), 2.0)}
    hook.after_clip(gradients, 0)
    assert set(gradients["a"].unique().tolist()) == {0.0, 4.0}
    assert gradients["a"].mean().item() == pytest.approx(1.0, abs=0.05)
    again = {"a": torch.ones(200, 200), "b": torch.full((100,), 2.0)}
    hook.after_clip(again, 0)
    assert torch.equal(again["a"], gradients["a"])
    other = {"a": torch.ones(200, 200)}
    hook.after_clip(other, 1)
    assert not torch.equal(other["a"], gradients["a"])


def test_child_tuning_by_fisher_keeps_the_largest_of_all_parameters() -> None:
    _, hook = child("fisher", share=0.5, fisher_steps=2)
    hook.calibrate({"a": torch.tensor([3.0, 0.1]), "b": torch.tensor([1.0, 0.0])})
    hook.calibrate({"a": torch.tensor([0.0, 0.1]), "b": torch.tensor([-2.5, 0.0])})
    gradients = {"a": torch.ones(2), "b": torch.ones(2)}
    hook.after_clip(gradients, 0)
    assert gradients["a"].tolist() == [1, 0]
    assert gradients["b"].tolist() == [1, 0]


def test_child_tuning_by_fisher_moves_only_what_it_chose_and_remembers_it() -> None:
    model, hook = child("fisher", share=0.2, fisher_steps=1)
    optimizer = Optimizer(model.named_parameters(), settings(4, hook=hook))
    loss_of(model).backward()
    optimizer.calibrate()
    before = trained(model)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    moved = sum(int((before[n] != p).sum()) for n, p in trained(model).items())
    total = sum(p.numel() for p in before.values())
    assert 0.15 < moved / total <= 0.2 + 1e-3
    resumed, later = child("fisher", share=0.2, fisher_steps=1)
    second = Optimizer(resumed.named_parameters(), settings(4, hook=later))
    second.load(optimizer.state(), 2)
    for each, steps in ((model, optimizer), (resumed, second)):
        loss_of(each).backward()
        steps.step()
    assert_same(resumed, model, tolerance=0)
