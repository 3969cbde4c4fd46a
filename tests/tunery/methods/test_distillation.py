"""Distillation: by hand, by TRL's numbers and gradients, and from a teacher that a run is given."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tunery.errors import InvalidConfig, UnsupportedCombination
from tunery.methods import distillation
from tunery.methods.distillation import Distillation, DistillationConfig, divergence
from tunery.request import parse_request
from tunery.resolve import further_models, resolve
from tunery.spec import DataFile
from tunery.tasks.text_generation import Runtime
from tunery.training import program
from tunery.training.control import StopFlag
from tunery.training.losses import TokenLossComputer
from tunery.training.protocol import EXIT_FAILED
from tunery.training.types import (
    DISCOUNTS,
    IGNORE,
    Document,
    Example,
    FurtherModel,
    MethodRun,
)

TEACHER = "example/teacher"
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"count {i}"},
            {"role": "assistant", "content": "x" * (i % 4 + 1) + "!"},
        ]
    }
    for i in range(10)
]


def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    made = []
    for index, length in enumerate((9, 5, 12)):
        ids = draw.integers(0, 200, length).astype(np.int32)
        labels = np.where(np.arange(length) < 3, np.int32(IGNORE), ids)
        made.append(Example((Document(ids, labels),), None, index))
    return made


def objective_of(student: Any, teacher: Any, tokenizer: Any, **settings: Any) -> Any:
    run = MethodRun(
        Runtime(),
        TokenLossComputer(student.get_base_model()),
        None,
        0,
        losses_of=TokenLossComputer,
        tokenizer=tokenizer,
        further_model=lambda name: FurtherModel(teacher.eval(), tokenizer),
    )
    return Distillation().objective(DistillationConfig(teacher_model=TEACHER, **settings), run)


def slopes(model: Any, loss: torch.Tensor) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss, trained, allow_unused=True)
            if g is not None
        ]
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_step_is_that_of_trl(
    beta: float,
    temperature: float,
    make_policy: Any,
    make_base: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    monkeypatch.setattr(distillation, "CHUNK_ROWS", 4)
    student, teacher = make_policy(), make_base(seed=8, hidden_size=48)
    batch = Runtime().collate(examples(), layout="rows", pad_id=0)
    objective = objective_of(student, teacher, tokenizer, beta=beta, temperature=temperature)
    loss = objective.loss(student, batch).loss / batch.supervised
    labels = torch.full(batch.input_ids.shape, IGNORE).flatten()
    labels[batch.target_positions + 1] = batch.target_ids
    theirs = GKDTrainer.generalized_jsd_loss(
        student(batch.input_ids).logits[:, :-1],
        teacher(batch.input_ids).logits[:, :-1].detach(),
        labels.view_as(batch.input_ids)[:, 1:],
        beta=beta,
        temperature=temperature,
    )
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(slopes(student, loss), slopes(student, theirs), rtol=1e-4, atol=1e-6)


def test_divergences_by_hand() -> None:
    p, q = [0.5, 0.5], [0.8, 0.2]
    logits = [torch.tensor([values]).log() for values in (q, p)]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    m = [0.25 * x + 0.75 * y for x, y in zip(p, q, strict=True)]
    by_hand = {0.0: kl(p, q), 1.0: kl(q, p), 0.25: 0.25 * kl(p, m) + 0.75 * kl(q, m)}
    for beta, expected in by_hand.items():
        found = divergence(*logits, beta=beta, temperature=1.0)
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_the_datas_answers_are_mixed_in(make_policy: Any, make_base: Any, tokenizer: Any) -> None:
    student, teacher = make_policy(), make_base(seed=8)
    batch = Runtime().collate(examples(), layout="rows", pad_id=0)
    out = objective_of(student, teacher, tokenizer, alpha=0.25).loss(student, batch)
    means = {name: (total / count).item() for name, (total, count) in out.sums.items()}
    mixed = 0.75 * means["divergence"] + 0.25 * means["nll_loss"]
    assert out.loss.item() / batch.supervised == pytest.approx(mixed, abs=1e-5)
    likelihood = TokenLossComputer(student.get_base_model())(student, batch)
    assert means["nll_loss"] == pytest.approx(likelihood.nll.mean().item(), abs=1e-5)
    assert means["token_accuracy"] == likelihood.correct.mean().item()


def test_a_step_does_not_depend_on_how_it_is_cut_and_heeds_weights(
    make_policy: Any, make_base: Any, tokenizer: Any
) -> None:
    student, teacher = make_policy(), make_base(seed=8)
    objective = objective_of(student, teacher, tokenizer, alpha=0.1)
    rows = examples()

    def total(*parts: list[Example]) -> torch.Tensor:
        batches = [Runtime().collate(part, layout="rows", pad_id=0) for part in parts]
        return sum(objective.loss(student, batch).loss for batch in batches)  # type: ignore[return-value]

    whole, cut = total(rows), total(rows[:1], rows[1:])
    torch.testing.assert_close(whole, cut)
    torch.testing.assert_close(slopes(student, whole), slopes(student, cut), rtol=1e-4, atol=1e-5)
    (document,) = rows[0].documents
    halved = Document(
        document.input_ids,
        document.labels,
        tracks={DISCOUNTS: np.full(len(document.input_ids), 0.5, np.float32)},
    )
    half = Example((halved,), None, 0)
    torch.testing.assert_close(total([half]), 0.5 * total(rows[:1]))
    assert objective.units(half) == 0.5 * objective.units(rows[0])


def test_heads_padded_to_different_widths_are_compared_where_tokens_are(
    make_policy: Any, make_base: Any, tokenizer: Any
) -> None:
    student = make_policy()
    teacher = make_base(seed=8, vocab_size=len(tokenizer) + 27)
    batch = Runtime().collate(examples(), layout="rows", pad_id=0)
    objective_of(student, teacher, tokenizer).loss(student, batch).loss.backward()


@pytest.fixture(scope="module")
def teacher_folder(
    make_base: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_base(seed=8, hidden_size=48).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_learns_from_the_teacher_it_is_given_and_resumes(
    make_order: Any, train: Any, series: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    config = {"teacher_model": TEACHER, "max_steps": 6, "learning_rate": 2e-2}
    paths = {TEACHER: str(teacher_folder)}
    order = make_order("distillation", ROWS, config, valid=ROWS[:3], every=3, model_paths=paths)
    events = train(order)
    losses = series(events, "train_loss")
    assert losses[-1] < losses[0] - 0.02
    assert series(events, "valid_divergence")[-1] < series(events, "valid_divergence")[0]
    assert not series(events, "valid_perplexity"), "a divergence has none"
    halfway = str(tmp_path / "run/checkpoints/step-00000003/resume")
    resumed = train(order.model_copy(update={"resume_path": halfway}), "resumed")
    assert series(resumed, "train_loss") == pytest.approx(losses[3:], abs=1e-6)


def test_a_teacher_of_another_vocabulary_is_refused(
    make_order: Any, teacher_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in teacher_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = (other / "tokenizer.json").read_text("utf-8")
    (other / "tokenizer.json").write_text(text.replace('"a":', '"ab":', 1), "utf-8")
    config = {"teacher_model": TEACHER, "max_steps": 1}
    order = make_order("distillation", ROWS, config, model_paths={TEACHER: str(other)})
    workdir = tmp_path / "run"
    workdir.mkdir()
    events: list[Any] = []
    assert program.run(order, workdir, events.append, StopFlag()) == EXIT_FAILED
    failure = next(event for event in events if event.kind == "failure")
    assert "another vocabulary" in failure.message
    assert (failure.code, failure.category) == (UnsupportedCombination("").code, "user_config")


def test_a_teacher_that_is_not_there_is_named(make_order: Any, tmp_path: Path) -> None:
    order = make_order("distillation", ROWS, {"teacher_model": TEACHER, "max_steps": 1})
    workdir = tmp_path / "run"
    workdir.mkdir()
    events: list[Any] = []
    assert program.run(order, workdir, events.append, StopFlag()) == EXIT_FAILED
    failure = next(event for event in events if event.kind == "failure")
    assert TEACHER in failure.message


def test_a_request_says_which_models_its_run_reads() -> None:
    file = DataFile(file_id="file-1", sha256="0", format="chat", rows=50, size_bytes=1000)

    def spec(method: Any) -> Any:
        request = parse_request({"model": "base", "training_file": "file-1", "method": method})
        return resolve(request, training=file, seed=1).spec

    (ref,) = further_models(spec(dict(Distillation.example)))
    assert (ref.name, ref.revision) == ("HuggingFaceTB/SmolLM2-360M-Instruct", None)
    assert further_models(spec({"type": "supervised"})) == ()
    with pytest.raises(InvalidConfig, match="teacher_model") as caught:
        spec({"type": "distillation"})
    assert caught.value.code == "missing_parameter"


@pytest.mark.parametrize("settings", [{"beta": 1.1}, {"temperature": 0}, {"alpha": 1.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DistillationConfig(teacher_model=TEACHER, **settings)
