"""What an objective is told of a step, and what it may ask the model, before the step's losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tunery.training.types import AsksModel, SeesSteps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunery.training.types import Batch, Example


class Curious:
    """Supervised training that remembers what it is told, and asks of every example twice."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seen: list[list[int]] = []
        self.totals: list[list[float]] = []
        self.order: list[str] = []

    def units(self, example: Example) -> float:
        return float(self._inner.units(example))

    def prepare(self, model: Any, batches: Any) -> None:
        return None

    def begin(self, examples: Iterable[Example]) -> None:
        self.order.append("begin")
        self.seen.append(sorted(example.index for example in examples))

    def questions(self, examples: Iterable[Example]) -> Sequence[Example]:
        return [example for example in examples for _ in range(2)]

    def answers(self, model: Any, batch: Batch) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.order.append("answers")
        loss = self._inner.loss(model, batch).loss
        return torch.stack([loss, loss.new_tensor(float(len(batch.indices)))])

    def told(self, totals: Sequence[float]) -> None:
        self.order.append("told")
        self.totals.append(list(totals))

    def loss(self, model: Any, batch: Batch) -> Any:
        self.order.append("loss")
        return self._inner.loss(model, batch)


def run(lab: Any, **settings: Any) -> tuple[Curious, Any]:
    model = lab.lora(random_b=True)
    objective = Curious(lab.objective(model))
    loop, record = lab.loop(
        model, lab.examples(8), steps=3, valid=lab.examples(3), objective=objective, **settings
    )
    loop.run()
    return objective, record


def test_the_whole_step_is_announced_before_its_losses(lab: Any) -> None:
    objective, _ = run(lab, micro_batch_tokens=40)
    assert isinstance(objective, SeesSteps)
    assert isinstance(objective, AsksModel)
    # The held-out rows before the first step and after each epoch of two, and at the end.
    sizes = [len(seen) for seen in objective.seen]
    assert sizes == [3, 4, 4, 3, 4, 3]
    assert sorted(objective.seen[1] + objective.seen[2]) == list(range(8))
    first = objective.order.index("loss")
    assert objective.order[0] == "begin"
    assert set(objective.order[1 : first - 1]) == {"answers"}
    assert objective.order[first - 1] == "told"


def test_answers_add_up_however_the_questions_are_cut(lab: Any) -> None:
    whole, record = run(lab)
    cut, cut_record = run(lab, micro_batch_tokens=40)
    assert cut.order.count("answers") > whole.order.count("answers")
    assert [total[1] for total in whole.totals] == [6, 8, 8, 6, 8, 6]
    for mine, theirs in zip(whole.totals, cut.totals, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    # Asking twice of every example tells twice the step's own loss.
    trained = [total[0] for total in whole.totals if total[1] == 8]
    per_unit = [total / 2 for total in trained]
    losses = record.series("train_loss")
    assert losses == pytest.approx(cut_record.series("train_loss"), abs=1e-5)
    units = [total / loss for total, loss in zip(per_unit, losses, strict=True)]
    assert units == pytest.approx([round(unit) for unit in units], abs=1e-3)


def test_a_question_that_does_not_fit_is_asked_in_smaller_parts(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run(lab)
    asked = Curious.answers

    def narrow(self: Curious, model: Any, batch: Batch) -> torch.Tensor:
        if batch.input_ids.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return asked(self, model, batch)

    monkeypatch.setattr(Curious, "answers", narrow)
    narrowed, record = run(lab)
    assert [code for code, _ in record.warnings][:1] == ["micro_batch_halved"]
    for mine, theirs in zip(plain.totals, narrowed.totals, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
