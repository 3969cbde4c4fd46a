"""ORPO and SimPO: by hand, by TRL's numbers and gradients, by cutting a step."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tunery import catalogue
from tunery.errors import InvalidConfig
from tunery.methods.orpo import OrpoConfig, log_odds
from tunery.methods.simpo import SimpoConfig, simpo_loss
from tunery.tasks.text_generation import Runtime
from tunery.training.losses import TokenLossComputer
from tunery.training.types import EncodeOptions, Example, MethodRun

PAIRS = [
    ("Is it open on Sunday?", "Yes, from ten to four.", "No idea."),
    ("Name a prime.", "Seven.", "Eight is prime, I am quite sure of it."),
    ("Say hi", "Hi!", "Go away"),
]


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def encoded(tokenizer: Any, objective: Any) -> list[Example]:
    options = EncodeOptions(
        format="preference",
        max_length=128,
        score_prompts=getattr(objective, "scores_prompts", False),
    )
    rows = [
        {
            "input": {"messages": turn("user", prompt)},
            "preferred_output": turn("assistant", good),
            "non_preferred_output": turn("assistant", bad),
        }
        for prompt, good, bad in PAIRS
    ]
    return [Runtime().encode(row, tokenizer, options, i) for i, row in enumerate(rows)]


def objective_of(method: str, model: Any, **settings: Any) -> Any:
    entry = catalogue.find("methods", method)
    run = MethodRun(Runtime(), TokenLossComputer(model.get_base_model()), None, 0)
    objective = entry.objective(entry.Config(**settings), run)
    objective.prepare(model, [])
    return objective


def moved(model: Any) -> Any:
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def slopes(model: Any, loss: torch.Tensor) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def ours(method: str, model: Any, tokenizer: Any, *cuts: slice, **settings: Any) -> Any:
    """Loss, metrics and gradient of the step, cut as told."""
    objective = objective_of(method, model, **settings)
    examples = encoded(tokenizer, objective)
    objective.begin(iter(examples))
    total, sums = torch.zeros(()), dict[str, list[float]]()
    for part in cuts or (slice(None),):
        batch = Runtime().collate(examples[part], layout="rows", pad_id=0)
        out = objective.loss(model, batch)
        total = total + out.loss / len(PAIRS)
        for name, (value, count) in out.sums.items():
            sum_, number = sums.get(name, [0.0, 0.0])
            sums[name] = [sum_ + value.item(), number + count.item()]
    metrics = {name: value / number for name, (value, number) in sums.items()}
    return total.item(), metrics, slopes(model, total)


def orpo_trainer(**common: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig(**common, beta=0.3)


def simpo_trainer(**common: Any) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.4}
    return CPOTrainer, CPOConfig(**common, **settings, label_smoothing=0.1)


SIMPO = {"beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.4, "label_smoothing": 0.1}
CASES = [
    pytest.param("orpo", {"beta": 0.3}, orpo_trainer, id="orpo"),
    pytest.param("simpo", SIMPO, simpo_trainer, id="simpo"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "settings", "make"), CASES)
def test_a_step_is_that_of_trl(
    method: str,
    settings: dict[str, Any],
    make: Callable[..., Any],
    make_policy: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets = pytest.importorskip("datasets")
    kind, arguments = make(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(PAIRS),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [
        {
            "prompt": turn("user", p),
            "chosen": turn("assistant", c),
            "rejected": turn("assistant", r),
        }
        for p, c, r in PAIRS
    ]
    trainer = kind(
        model=moved(make_policy()),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    model = moved(make_policy())
    mine, named, gradient = ours(method, model, tokenizer, **settings)
    assert mine == pytest.approx(loss.item(), abs=1e-5)
    shared = named.keys() & metrics.keys()
    assert {"rewards/chosen", "rewards/margins", "logps/rejected", "nll_loss"} <= shared
    for name in shared:
        assert named[name] == pytest.approx(metrics[name], abs=1e-5), name
    torch.testing.assert_close(gradient, slopes(trainer.model, loss), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "settings", "make"), CASES)
def test_a_step_does_not_depend_on_how_it_is_cut(
    method: str, settings: dict[str, Any], make: Any, make_policy: Any, tokenizer: Any
) -> None:
    model = moved(make_policy())
    whole = ours(method, model, tokenizer, **settings)
    cut = ours(method, model, tokenizer, slice(0, 1), slice(1, 3), **settings)
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)
    assert cut[1] == pytest.approx(whole[1], abs=1e-5)
    torch.testing.assert_close(cut[2], whole[2], rtol=1e-4, atol=1e-5)


def test_log_odds_by_hand_and_at_the_edges() -> None:
    assert log_odds(torch.tensor([math.log(0.5)])).item() == pytest.approx(0, abs=1e-6)
    assert log_odds(torch.tensor([math.log(0.8)])).item() == pytest.approx(math.log(4), abs=1e-5)
    edges = torch.tensor([-1e-6, -50.0], requires_grad=True)
    found = log_odds(edges)
    assert found.tolist() == pytest.approx([math.log(1e6), -50.0], rel=1e-2)
    found.sum().backward()
    assert edges.grad is not None
    assert edges.grad.isfinite().all()


def test_a_simpo_pair_by_hand() -> None:
    # 2 (-1 + 1.5) - 0.4 = 0.6
    loss = simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma=0.4)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.6)))


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_a_row_that_is_no_pair_is_refused(method: str, make_policy: Any, tokenizer: Any) -> None:
    objective = objective_of(method, make_policy())
    pair = encoded(tokenizer, objective)[0]
    with pytest.raises(InvalidConfig, match="row 0 is not a pair"):
        objective.units(Example(pair.documents[:1], None, 0))


def test_settings_that_make_no_sense_are_refused() -> None:
    for config, settings in (
        (OrpoConfig, {"beta": 0}),
        (SimpoConfig, {"simpo_gamma": -1}),
        (SimpoConfig, {"label_smoothing": 0.5}),
    ):
        with pytest.raises(ValidationError):
            config(**settings)  # type: ignore[operator]
