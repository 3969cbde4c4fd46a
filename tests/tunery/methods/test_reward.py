"""Reward models: by hand, by TRL's numbers and gradients, and loaded by transformers alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from tunery import catalogue
from tunery.errors import InvalidConfig, InvalidData
from tunery.methods.reward import Reward, RewardConfig
from tunery.tasks.reward_modeling import Runtime, bradley_terry
from tunery.training.types import EncodeOptions, Example, MethodRun

PAIRS = [
    ("Is it open on Sunday?", "Yes, from ten to four.", "No idea.", 0.5),
    ("Name a prime.", "Seven.", "Eight is prime, I am quite sure of it.", 0.0),
    ("Say hi", "Hi!", "Go away", 1.5),
]


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "input": {"messages": turn("user", prompt)},
            "preferred_output": turn("assistant", good),
            "non_preferred_output": turn("assistant", bad),
            "margin": margin,
        }
        for prompt, good, bad, margin in PAIRS
    ]


def model_of(folder: Path) -> Any:
    torch.manual_seed(1)  # The head is drawn.
    return Runtime().load_model(folder, dtype=torch.float32, labels=None)


def objective_of(**settings: Any) -> Any:
    run = MethodRun(Runtime(), None, None, 0)  # type: ignore[arg-type]
    return Reward().objective(RewardConfig(**settings), run)


def encoded(tokenizer: Any) -> list[Example]:
    options = EncodeOptions(format="preference", max_length=128)
    return [Runtime().encode(row, tokenizer, options, i) for i, row in enumerate(rows())]


def slopes(model: Any, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.filterwarnings("ignore")
def test_a_step_is_that_of_trl(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from trl import RewardConfig as TrlConfig
    from trl import RewardTrainer

    data = [
        {
            "chosen": turn("user", p) + turn("assistant", c),
            "rejected": turn("user", p) + turn("assistant", r),
            "margin": margin,
        }
        for p, c, r, margin in PAIRS
    ]
    trainer = RewardTrainer(
        model=model_of(base_folder),
        args=TrlConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(PAIRS),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            center_rewards_coefficient=0.05,
        ),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    theirs = trainer.compute_loss(trainer.model.train(), inputs)
    said = {name: value[-1] for name, value in trainer._metrics["train"].items()}
    model = model_of(base_folder)
    batch = Runtime().collate(encoded(tokenizer), layout="rows", pad_id=0)
    objective = objective_of(center_rewards_coefficient=0.05)
    objective.prepare(model, [])
    out = objective.loss(model, batch)
    assert out.loss.item() / len(PAIRS) == pytest.approx(theirs.item(), abs=1e-5)
    for name in ("accuracy", "margin", "mean_reward"):
        total, count = out.sums[name]
        assert (total / count).item() == pytest.approx(said[name], abs=1e-5), name
    torch.testing.assert_close(
        slopes(model, out.loss / len(PAIRS)), slopes(trainer.model, theirs), rtol=1e-4, atol=1e-5
    )


def test_a_pair_by_hand() -> None:
    scores = torch.tensor([[2.0, 1.0]])
    assert bradley_terry(scores).item() == pytest.approx(math.log(1 + math.exp(-1)))
    by_margin = bradley_terry(scores, torch.tensor([1.5])).item()
    assert by_margin == pytest.approx(math.log(1 + math.exp(0.5)))


def test_a_step_does_not_depend_on_how_it_is_cut(base_folder: Path, tokenizer: Any) -> None:
    model, examples = model_of(base_folder), encoded(tokenizer)
    objective = objective_of(center_rewards_coefficient=0.05)

    def total(*parts: Any) -> torch.Tensor:
        batches = [Runtime().collate(part, layout="rows", pad_id=0) for part in parts]
        return sum(objective.loss(model, batch).loss for batch in batches)  # type: ignore[return-value]

    torch.testing.assert_close(total(examples), total(examples[:1], examples[1:]))


def test_what_is_no_pair_or_no_margin_is_refused(tokenizer: Any) -> None:
    example = encoded(tokenizer)[0]
    with pytest.raises(InvalidConfig, match="row 0 is not a pair"):
        objective_of().units(Example(example.documents[:1], None, 0))
    row = {**rows()[0], "margin": "large"}
    options = EncodeOptions(format="preference", max_length=128)
    with pytest.raises(InvalidData, match="row 7: margin must be a number"):
        Runtime().encode(row, tokenizer, options, 7)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_leaves_a_classifier_of_one_score(
    adapter: str, make_order: Any, train: Any, series: Any, base_folder: Path, tmp_path: Path
) -> None:
    from tunery.spec import Use

    config = {"max_steps": 12, "batch_size": 3, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    use = Use(type=adapter, config={"r": 4} if adapter == "lora" else {})
    order = make_order("reward", rows(), config, task="reward-modeling", adapter=use, valid=rows())
    events = train(order)
    losses = series(events, "train_loss")
    assert losses[-1] < losses[0] - 0.1
    assert series(events, "valid_accuracy")[-1] == 1.0
    export = tmp_path / "run/checkpoints/step-00000012/export"
    assert AutoConfig.from_pretrained(export).num_labels == 1
    if adapter == "full":
        loaded = AutoModelForSequenceClassification.from_pretrained(export)
    else:
        torch.manual_seed(8)
        base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
        loaded = PeftModel.from_pretrained(base, export)
    loaded.eval()
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        assert loaded(ids).logits.shape == (1, 1)


def test_preference_rows_become_a_reward_models_without_naming_the_task() -> None:
    from tunery.request import parse_request
    from tunery.resolve import resolve
    from tunery.spec import DataFile

    file = DataFile(file_id="file-1", sha256="0", format="preference", rows=50, size_bytes=1000)
    request = parse_request(
        {"model": "base", "training_file": "file-1", "method": dict(Reward.example)}
    )
    resolved = resolve(request, training=file, seed=1)
    assert resolved.spec.task.type == "reward-modeling"
    assert resolved.sources["task.type"] == "auto: reward trains nothing else"
    assert catalogue.find("tasks", "reward-modeling").formats == {"preference"}
