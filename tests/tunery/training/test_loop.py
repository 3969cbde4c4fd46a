"""One step is one step, however it is cut; and what stops a run says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tunery.errors import NonFiniteLoss, OutOfMemory
from tunery.training import batching
from tunery.training.control import StopFlag
from tunery.training.features import Switches, switches
from tunery.training.loop import LoopState
from tunery.training.losses import HeadPolicy

if TYPE_CHECKING:
    from collections.abc import Callable


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


def reference_losses(lab: Any, examples: Any, steps: int) -> tuple[list[float], Any]:
    """The same run in the plainest torch: one document at a time, all logits, AdamW by tensor."""
    model = lab.lora()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        factor = min(1.0, step / 1) * max(0.0, (steps - step) / (steps - 1)) if step else 0.0
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * factor
        chosen = batching.global_batch(len(examples), 4, 3, step)
        total, count = torch.zeros(()), 0
        for number in chosen:
            (document,) = examples[number].documents
            ids = torch.tensor(document.input_ids, dtype=torch.int64)[None]
            labels = torch.tensor(document.labels, dtype=torch.int64)[None]
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels[0, 1:], ignore_index=-100, reduction="sum"
            )
            count += document.supervised
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append((total / count).item())
    return losses, model


def test_losses_and_weights_are_those_of_a_plain_torch_loop(lab: Any) -> None:
    examples = lab.examples(14)
    expected, plain = reference_losses(lab, examples, 6)
    model = lab.lora()
    loop, record = lab.loop(model, examples, steps=6)
    assert loop.run()
    assert record.series("train_loss") == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[-1], abs=0.05), "nothing was learnt"
    assert_same(weights(model), weights(plain), 1e-5)


@pytest.mark.parametrize("budget", [24, 60])
def test_accumulated_is_one_batch(lab: Any, budget: int) -> None:
    examples = lab.examples(14)
    whole_model, cut_model = lab.lora(), lab.lora()
    whole_loop, whole = lab.loop(whole_model, examples)
    cut_loop, cut = lab.loop(cut_model, examples, micro_batch_tokens=budget)
    whole_loop.run()
    cut_loop.run()
    assert cut.series("train_loss") == pytest.approx(whole.series("train_loss"), abs=1e-5)
    assert cut.series("grad_norm") == pytest.approx(whole.series("grad_norm"), abs=1e-4)
    assert_same(weights(cut_model), weights(whole_model), 1e-5)


@pytest.mark.parametrize(
    "without",
    ["length_split", "label_compaction", "deferred_metrics", "flat_optimizer", "frozen_prefix"],
)
def test_each_optimisation_off_gives_the_same_losses(lab: Any, without: str) -> None:
    examples = lab.examples(14)
    on_loop, on = lab.loop(lab.lora(), examples, micro_batch_tokens=60)
    on_loop.run()
    chosen = switches((without,))
    assert chosen != Switches()
    model = lab.lora()
    if not chosen.frozen_prefix:
        model.enable_input_require_grads()
    off_loop, off = lab.loop(
        model,
        examples,
        micro_batch_tokens=60,
        policy=HeadPolicy(compact=chosen.label_compaction),
        optimizer={"flat": chosen.flat_optimizer},
        switches=chosen,
    )
    off_loop.run()
    assert off.series("train_loss") == pytest.approx(on.series("train_loss"), abs=1e-5)
    assert off.series("grad_norm") == pytest.approx(on.series("grad_norm"), abs=1e-4)


def test_packed_rows_train_as_separate_rows(lab: Any) -> None:
    from tunery.training import packing

    examples = lab.examples(14)
    rows_loop, rows = lab.loop(lab.lora(), examples)
    rows_loop.run()
    model = lab.lora()
    assert packing.switch_on(model.get_base_model())
    packed_loop, packed = lab.loop(model, examples, layout="packed", micro_batch_tokens=40)
    packed_loop.run()
    assert packed.series("train_loss") == pytest.approx(rows.series("train_loss"), abs=1e-5)


def test_weights_of_documents_scale_the_loss(lab: Any) -> None:
    heavy = lab.examples(4, seed=1, weight=3.0)
    light = lab.examples(4, seed=2)
    mixed = [*heavy, *light]
    model = lab.lora()
    loop, record = lab.loop(model, mixed, steps=1, batch_size=8)
    loop.run()
    alone = lab.loop(lab.lora(), light, steps=1)[0]
    by_hand = {}
    for name, examples in (("heavy", heavy), ("light", light)):
        part, said = lab.loop(lab.lora(), examples, steps=1)
        part.run()
        by_hand[name] = (said.series("train_loss")[0], float(part.train.units.sum()))
    del alone
    total = sum(loss * units for loss, units in by_hand.values())
    expected = total / sum(units for _, units in by_hand.values())
    assert record.series("train_loss")[0] == pytest.approx(expected, abs=1e-5)


def test_a_ghost_micro_batch_counts_nothing(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = lab.examples(14)
    alone_model, model = lab.lora(), lab.lora()
    alone_loop, alone = lab.loop(alone_model, examples)
    alone_loop.run()
    loop, record = lab.loop(model, examples)
    plan = loop._plan
    ghost = batching.MicroBatch((0,), ghost=True)
    monkeypatch.setattr(loop, "_plan", lambda *args: [*plan(*args), ghost])
    loop.run()
    assert record.series("train_loss") == alone.series("train_loss")
    assert_same(weights(model), weights(alone_model), 0.0)


def test_a_point_every_n_steps_is_the_mean_over_its_tokens(lab: Any) -> None:
    examples = lab.examples(14)
    fine_loop, fine = lab.loop(lab.lora(), examples, steps=4)
    fine_loop.run()
    coarse_loop, coarse = lab.loop(lab.lora(), examples, steps=4, logging_steps=2)
    coarse_loop.run()
    units = [
        sum(examples[i].documents[0].supervised for i in batching.global_batch(14, 4, 3, step))
        for step in range(4)
    ]
    losses = fine.series("train_loss")
    expected = [
        (losses[a] * units[a] + losses[a + 1] * units[a + 1]) / (units[a] + units[a + 1])
        for a in (0, 2)
    ]
    assert [p["step"] for p in coarse.points if "train_loss" in p] == [2, 4]
    assert coarse.series("train_loss") == pytest.approx(expected, abs=1e-6)


def test_evaluation_comes_before_the_first_step_then_each_epoch(lab: Any) -> None:
    examples = lab.examples(8)
    loop, record = lab.loop(lab.lora(), examples, steps=6, valid=lab.examples(5, seed=9))
    loop.run()
    evaluated = [point["step"] for point in record.points if "valid_loss" in point]
    assert evaluated == [0, 2, 4, 6]
    assert record.phases == [*["evaluating", "training"] * 4, "saving"]
    plain_loop, plain = lab.loop(lab.lora(), examples, steps=2)
    plain_loop.run()
    assert plain.phases == ["training", "saving"]


def test_evaluation_trains_nothing_and_draws_nothing(lab: Any) -> None:
    examples = lab.examples(14)
    model, other = lab.lora(dropout=0.3), lab.lora(dropout=0.3)
    with_loop, with_evaluation = lab.loop(
        model, examples, valid=lab.examples(5, seed=9), evaluate_every=1
    )
    without_loop, without = lab.loop(other, examples)
    with_loop.run()
    without_loop.run()
    assert with_evaluation.series("train_loss") == without.series("train_loss")
    assert len(with_evaluation.series("valid_loss")) == 7


def test_evaluation_is_without_dropout(lab: Any) -> None:
    valid = lab.examples(5, seed=9)
    losses = []
    for dropout in (0.0, 0.3):
        model = lab.lora(dropout=dropout, random_b=True)
        standing = {"learning_rate": 0.0}
        loop, record = lab.loop(
            model, lab.examples(8), steps=2, valid=valid, evaluate_every=1, optimizer=standing
        )
        loop.run()
        losses.append(record.series("valid_loss"))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 1


def refusing(objective: Any, limit: int, error: Callable[[], BaseException]) -> Any:
    """The objective on a device that holds `limit` positions."""

    class Refusing:
        units = objective.units
        calls = 0

        def loss(self, model: Any, batch: Any) -> Any:
            if batch.input_ids.numel() > limit:
                raise error()
            self.calls += 1
            return objective.loss(model, batch)

    return Refusing()


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory."),
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_micro_batch_and_changes_no_loss(lab: Any, error: Any) -> None:
    examples = lab.examples(14)
    roomy_loop, roomy = lab.loop(lab.lora(dropout=0.0), examples)
    roomy_loop.run()
    model = lab.lora(dropout=0.0)
    tight_loop, tight = lab.loop(
        model, examples, objective=refusing(lab.objective(model), 40, error)
    )
    assert tight_loop.run()
    assert tight.series("train_loss") == pytest.approx(roomy.series("train_loss"), abs=1e-5)
    assert {code for code, _ in tight.warnings} == {"micro_batch_halved"}
    assert tight_loop.state.budget <= 40
    assert len(tight.warnings) <= 3, "what was learnt about the memory was forgotten"


def test_a_resumed_run_remembers_what_fits(lab: Any) -> None:
    loop, _ = lab.loop(lab.lora(), lab.examples(14), state=LoopState(step=1, budget=40))
    planned = loop._plan(loop.train, loop.source.draw(1, 0).chosen)
    assert max(loop.train.longest[list(m.examples)].max() * len(m.examples) for m in planned) <= 40


def test_what_a_step_had_added_up_before_memory_ran_out_is_forgotten(lab: Any) -> None:
    examples = lab.examples(14)
    roomy_model, model = lab.lora(), lab.lora()
    roomy_loop, roomy = lab.loop(roomy_model, examples, micro_batch_tokens=60)
    roomy_loop.run()
    inner = lab.objective(model)

    class SecondCallFails:
        units = inner.units
        calls = 0

        def loss(self, model: Any, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError("no")
            return inner.loss(model, batch)

    loop, record = lab.loop(model, examples, micro_batch_tokens=60, objective=SecondCallFails())
    assert len(loop._plan(loop.train, loop.source.draw(0, 0).chosen)) > 1
    loop.run()
    assert [code for code, _ in record.warnings] == ["micro_batch_halved"]
    assert record.series("grad_norm") == pytest.approx(roomy.series("grad_norm"), abs=1e-4)
    assert_same(weights(model), weights(roomy_model), 1e-5)


def test_an_example_that_does_not_fit_alone_ends_the_run(lab: Any) -> None:
    model = lab.lora()
    objective = refusing(lab.objective(model), 3, lambda: torch.OutOfMemoryError("no"))
    before = weights(model)
    loop, _ = lab.loop(model, lab.examples(8), objective=objective)
    with pytest.raises(OutOfMemory, match="one example of"):
        loop.run()
    assert_same(weights(model), before, 0.0)


def test_evaluation_that_runs_out_of_memory_is_cut_too(lab: Any) -> None:
    model = lab.lora()
    objective = refusing(lab.objective(model), 48, lambda: torch.OutOfMemoryError("no"))
    loop, record = lab.loop(
        model,
        lab.examples(2),
        objective=objective,
        valid=lab.examples(30, seed=5),
        batch_size=1,
        micro_batch_tokens=150,
    )
    roomy_loop, roomy = lab.loop(
        lab.lora(), lab.examples(2), valid=lab.examples(30, seed=5), batch_size=1
    )
    loop.run()
    roomy_loop.run()
    assert record.series("valid_loss") == pytest.approx(roomy.series("valid_loss"), abs=1e-5)
    assert record.warnings


def test_another_error_is_not_taken_for_memory(lab: Any) -> None:
    model = lab.lora()
    objective = refusing(lab.objective(model), 3, lambda: RuntimeError("shapes differ"))
    loop, _ = lab.loop(model, lab.examples(8), objective=objective)
    with pytest.raises(RuntimeError, match="shapes differ"):
        loop.run()


def test_the_probe_runs_the_heaviest_micro_batch_and_leaves_no_trace(lab: Any) -> None:
    model = lab.lora()
    before = weights(model)
    sizes: list[int] = []
    inner = lab.objective(model)

    class Watching:
        units = inner.units

        def loss(self, model: Any, batch: Any) -> Any:
            sizes.append(batch.input_ids.numel())
            return inner.loss(model, batch)

    loop, _ = lab.loop(model, lab.examples(14), objective=Watching(), micro_batch_tokens=60)
    loop.probe()
    probed = sizes.pop()
    loop.run()
    assert probed >= max(sizes) - 24
    plain_loop, plain = lab.loop(lab.lora(), lab.examples(14), micro_batch_tokens=60)
    del plain
    plain_loop.run()
    assert_same(weights(model), weights(plain_loop.engine.model), 0.0)
    assert before


def test_a_loss_that_is_not_finite_names_step_and_rows(lab: Any) -> None:
    examples = lab.examples(8)
    model = lab.lora()
    inner = lab.objective(model)
    bad_row = int(batching.global_batch(8, 4, 3, 1)[0])

    class Poisoned:
        units = inner.units

        def loss(self, model: Any, batch: Any) -> Any:
            out = inner.loss(model, batch)
            if bad_row in batch.indices:
                out.loss = out.loss * float("nan")
            return out

    loop, record = lab.loop(
        model, examples, objective=Poisoned(), micro_batch_tokens=1, logging_steps=2
    )
    with pytest.raises(NonFiniteLoss, match=rf"step 2, .*rows {bad_row}\)"):
        loop.run()
    assert record.saves == []


def test_no_checkpoint_is_written_of_a_poisoned_state(lab: Any) -> None:
    model = lab.lora()
    inner = lab.objective(model)

    class Poisoned:
        units = inner.units

        def loss(self, model: Any, batch: Any) -> Any:
            out = inner.loss(model, batch)
            out.loss = out.loss * float("inf")
            return out

    loop, record = lab.loop(
        model, lab.examples(8), objective=Poisoned(), logging_steps=5, checkpoint_every=1
    )
    with pytest.raises(NonFiniteLoss):
        loop.run()
    assert record.saves == []


def test_stop_is_obeyed_at_the_next_step_with_a_checkpoint(lab: Any) -> None:
    stop = StopFlag()
    stop.request_stop()
    loop, record = lab.loop(lab.lora(), lab.examples(8), stop=stop)
    assert loop.run() is False
    assert record.saves == [(1, False)]


def test_a_checkpoint_asked_for_is_written_once(lab: Any) -> None:
    stop = StopFlag()
    stop.request_checkpoint()
    loop, record = lab.loop(lab.lora(), lab.examples(8), steps=3, stop=stop)
    assert loop.run() is True
    assert record.saves == [(1, False), (3, True)]


def test_checkpoints_are_written_every_n_steps_and_once_at_the_end(lab: Any) -> None:
    loop, record = lab.loop(lab.lora(), lab.examples(8), steps=4, checkpoint_every=2)
    loop.run()
    assert record.saves == [(2, False), (4, True)]


def test_points_carry_what_a_person_watches(lab: Any) -> None:
    loop, record = lab.loop(lab.lora(), lab.examples(8), steps=3)
    loop.run()
    last = record.points[-1]
    assert last["left"] == 0
    assert last["epoch"] == pytest.approx(1.5)
    assert {"train_mean_token_accuracy", "tokens_per_second", "grad_norm"} <= last.keys()
    assert record.series("learning_rate") == pytest.approx([0.0, 1e-2, 5e-3])
    supervised = sum(e.documents[0].supervised for e in lab.examples(8))
    assert record.points[1]["trained_tokens"] == supervised
