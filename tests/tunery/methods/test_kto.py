"""KTO: by hand, by TRL's numbers and gradients, by cutting a step, from rows of either format."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tunery.data import formats
from tunery.errors import InvalidConfig
from tunery.methods.kto import Kto, KtoConfig, kto_loss, mismatched
from tunery.tasks.text_generation import Runtime
from tunery.training.losses import TokenLossComputer
from tunery.training.types import IGNORE, Document, EncodeOptions, Example, MethodRun

ROWS = [
    ("Is it open on Sunday?", "Yes, from ten to four.", True),
    ("Name a prime.", "Eight is prime, I am quite sure of it.", False),
    ("Say hi", "Hi!", True),
    ("Count", "One, two, three.", True),
]
SETTINGS: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": turn("user", p), "completion": turn("assistant", c), "label": wanted}
        for p, c, wanted in ROWS
    ]


def encoded(tokenizer: Any) -> list[Example]:
    options = EncodeOptions(format="unpaired_preference", max_length=128)
    return [Runtime().encode(row, tokenizer, options, i) for i, row in enumerate(rows())]


def moved(model: Any) -> Any:
    """Away from the reference, by a draw under which the divergence is above 0."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "lora_" not in name):
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def slopes(model: Any, loss: torch.Tensor) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def objective_of(model: Any, **settings: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    run = MethodRun(
        Runtime(),
        TokenLossComputer(base),
        getattr(model, "disable_adapter", None),
        0,
        losses_of=TokenLossComputer,
    )
    objective = Kto().objective(KtoConfig(**{**SETTINGS, **settings}), run)
    objective.prepare(model, [])
    return objective


def ask(objective: Any, model: Any, examples: Any, *cuts: slice) -> None:
    questions = objective.questions(iter(examples))
    totals = [
        objective.answers(model, Runtime().collate(questions[part], layout="rows", pad_id=0))
        for part in cuts or (slice(None),)
    ]
    objective.told(sum(totals).tolist())


def ours(objective: Any, model: Any, examples: Any, *cuts: slice) -> Any:
    ask(objective, model, examples, *cuts)
    units = sum(objective.units(example) for example in examples)
    total, sums = torch.zeros(()), dict[str, list[float]]()
    for part in cuts or (slice(None),):
        out = objective.loss(model, Runtime().collate(examples[part], layout="rows", pad_id=0))
        total = total + out.loss / units
        for name, (value, count) in out.sums.items():
            before = sums.get(name, [0.0, 0.0])
            sums[name] = [before[0] + value.item(), before[1] + count.item()]
    metrics = {name: value / count for name, (value, count) in sums.items() if count}
    return total.item(), metrics, slopes(model, total)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_step_is_that_of_trl(
    loss_type: Any, make_policy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    from trl import KTOConfig, KTOTrainer

    trainer = KTOTrainer(
        model=make_policy(),
        args=KTOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(ROWS),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            loss_type=loss_type,
            **SETTINGS,
        ),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=tokenizer,
    )
    moved(trainer.model)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    theirs = trainer.compute_loss(trainer.model, inputs)
    said = {name: value[-1] for name, value in trainer._metrics["train"].items()}
    model = moved(make_policy())
    objective = objective_of(model, loss_type=loss_type)
    if loss_type == "kto":
        assert said["kl"] > 0.01, "the divergence would not show"
        mine, named, gradient = ours(objective, model, encoded(tokenizer))
    else:
        assert objective.questions(iter(encoded(tokenizer))) == ()
        batch = Runtime().collate(encoded(tokenizer), layout="rows", pad_id=0)
        out = objective.loss(model, batch)
        mine, gradient = out.loss.item() / len(ROWS), slopes(model, out.loss / len(ROWS))
        named = {name: (value / count).item() for name, (value, count) in out.sums.items()}
    assert mine == pytest.approx(theirs.item(), abs=1e-5)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert named[name] == pytest.approx(said[name], abs=1e-5, rel=1e-6), name
    torch.testing.assert_close(gradient, slopes(trainer.model, theirs), rtol=1e-3, atol=1e-5)


def test_a_step_does_not_depend_on_how_it_is_cut(make_policy: Any, tokenizer: Any) -> None:
    model = moved(make_policy())
    objective = objective_of(model)
    examples = encoded(tokenizer)
    whole = ours(objective, model, examples)
    cut = ours(objective, model, examples, slice(0, 1), slice(1, 4))
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)
    assert cut[1] == pytest.approx(whole[1], abs=1e-4)
    torch.testing.assert_close(cut[2], whole[2], rtol=1e-3, atol=1e-5)


def test_replies_by_hand() -> None:
    # beta 0.5, z 1: a wanted reply of ratio 3 costs 1 - sigmoid(1), an unwanted one sigmoid(1).
    found = kto_loss(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), 1.0, 0.5)
    one = 1 / (1 + np.exp(-1.0))
    assert found.tolist() == pytest.approx([1 - one, one])


def test_each_prompt_stands_with_the_completion_before_it() -> None:
    def document(prompt: list[int], completion: list[int]) -> Document:
        ids = np.array([*prompt, *completion], dtype=np.int32)
        labels = np.array([IGNORE] * len(prompt) + completion, dtype=np.int32)
        return Document(ids, labels)

    made = mismatched([document([1, 2], [3]), document([4], [5, 6]), document([7], [8])], 3)
    found = [(e.documents[0].input_ids.tolist(), e.documents[0].labels.tolist()) for e in made]
    assert found == [
        ([1, 2, 8], [IGNORE, IGNORE, 8]),
        ([4, 3], [IGNORE, 3]),
        ([7, 5, 6], [IGNORE, 5, 6]),
    ]


def test_a_divergence_below_zero_counts_as_none(make_policy: Any, tokenizer: Any) -> None:
    model = make_policy()
    objective = objective_of(model)
    objective.told([-8.0, 4.0])
    batch = Runtime().collate(encoded(tokenizer), layout="rows", pad_id=0)
    # The untrained model: every ratio is 0, every loss 1/2.
    expected = 0.5 * (3 * 1.2 + 0.7)
    assert objective.loss(model, batch).loss.item() == pytest.approx(expected, abs=1e-5)


def test_full_fine_tuning_keeps_a_copy_to_compare_with(make_policy: Any, tokenizer: Any) -> None:
    model = make_policy("full")
    before = copy.deepcopy(model)
    objective = objective_of(model)
    moved(model)
    batch = Runtime().collate(encoded(tokenizer), layout="rows", pad_id=0)
    with torch.no_grad():
        kept = objective._untrained(model, batch)
        expected = TokenLossComputer(before)(before, batch).document_logprobs(batch)
    torch.testing.assert_close(kept, expected)
    assert not any(p.requires_grad for p in objective._untrained._copy.parameters())


def test_a_pair_is_a_wanted_and_an_unwanted_reply(make_policy: Any, tokenizer: Any) -> None:
    model = moved(make_policy())
    objective = objective_of(model)
    single = encoded(tokenizer)[:2]
    pair = Example((single[0].documents[0], single[1].documents[0]), None, 0)
    assert objective.units(pair) == 2.0
    as_pair = ours(objective, model, [pair])
    as_rows = ours(objective, model, single)
    assert as_pair[0] == pytest.approx(as_rows[0], abs=1e-6)
    assert as_pair[1] == pytest.approx(as_rows[1], abs=1e-5)


def test_a_row_without_a_label_is_refused(make_policy: Any, tokenizer: Any) -> None:
    with pytest.raises(InvalidConfig, match="row 0 is neither a marked reply nor a pair"):
        objective_of(make_policy()).units(Example(encoded(tokenizer)[0].documents, None, 0))


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        KtoConfig(batch_size=1)


@pytest.mark.parametrize(
    ("label", "meant"), [(True, True), (0, False), ("False", False), ("1", True)]
)
def test_a_label_may_be_spelled_in_many_ways(label: Any, meant: bool) -> None:
    row = {"prompt": "Hi", "completion": "Hello", "label": label}
    form = formats.detect(row)
    assert isinstance(form, formats.Format)
    assert form.name == "unpaired_preference"
    assert list(form.check(row)) == []
    normal = form.normal(row)
    assert normal["label"] is meant
    assert normal["prompt"] == turn("user", "Hi")
    assert normal["completion"] == turn("assistant", "Hello")


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        ({"prompt": "Hi", "completion": "Ho", "label": "maybe"}, "label", "wrong_type"),
        ({"prompt": "Hi", "completion": "Ho", "label": 2}, "label", "wrong_type"),
        ({"prompt": "Hi", "completion": [], "label": True}, "completion", "empty_messages"),
        ({"prompt": [], "completion": "Ho", "label": True}, "prompt", "empty_messages"),
        (
            {"prompt": "Hi", "completion": turn("user", "x"), "label": 1},
            "completion.0.role",
            "bad_role",
        ),
    ],
)
def test_a_broken_row_is_named(row: Any, path: str, code: str) -> None:
    found = list(formats.check(row, formats.find("unpaired_preference")))
    assert [(finding.path, finding.code) for finding in found] == [(path, code)]


def test_prompts_with_completions_and_another_label_are_no_marked_replies() -> None:
    form = formats.detect({"prompt": "Hi", "completion": "Ho", "label": "greeting"})
    assert isinstance(form, formats.Format)
    assert form.name == "prompt_completion"
