"""What every method has to keep, by its own example and row as printed. New ones are found.

Each trains a tiny model through the trainer's program: resumed at a step, cut into other
micro-batches, packed or on two ranks, it has the same losses.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunery import catalogue
from tunery.data import formats
from tunery.request import parse_request
from tunery.resolve import further_models, resolve
from tunery.spec import Compute, DataFile
from tunery.training import packing, program
from tunery.training.control import StopFlag
from tunery.training.protocol import EXIT_DONE, RunOrder, read_event

REPOSITORY = Path(__file__).parents[3]
STEPS = 4
ELSEWHERE = {"contrastive", "grpo", "ppo", "rloo"}
"""Train encoders, or draw what they learn from: tried where that is at home."""
METHODS = [name for name in catalogue.entries("methods") if name not in ELSEWHERE]
every_method = pytest.mark.parametrize("method", METHODS)


def varied(value: Any, number: int, key: str = "") -> Any:
    """The example row once more, with other words and another label."""
    if isinstance(value, dict):
        return {name: varied(part, number, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [varied(part, number) for part in value]
    if isinstance(value, bool):
        return value is (number % 3 > 0)
    if isinstance(value, str) and key in ("content", "text"):
        return value[: 6 + 5 * (number % 4)] + str(number)
    return value


@dataclass
class Bench:
    """Runs of one method's example, each in a folder of its own."""

    home: Path
    base: Path

    def order(
        self, method: str, *, adapter: str = "lora", strategy: str = "single", tokens: int = 4096
    ) -> RunOrder:
        entry = catalogue.find("methods", method)
        rows = [varied(dict(entry.example_row), number) for number in range(9)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = self.home / f"{method}.jsonl"
        path.write_text(text, "utf-8")
        form = formats.detect(rows[0])
        assert isinstance(form, formats.Format), form
        file = DataFile(
            file_id="file-1", sha256=method, format=form.name, rows=len(rows), size_bytes=len(text)
        )
        spec = resolve(
            parse_request(self._body(method, adapter)), training=file, validation=file, seed=5
        ).spec
        compute = Compute(
            device="cpu",
            strategy=strategy,  # type: ignore[arg-type]
            gpus=1 if strategy == "single" else 2,
            micro_batch_tokens=tokens,
        )
        return RunOrder(
            run="run-1",
            spec=spec.model_copy(update={"compute": compute}),
            base_model_path=str(self.base),
            model_paths={ref.name: str(self.base) for ref in further_models(spec)},
            training_path=str(path),
            validation_path=str(path),
        )

    def _body(self, method: str, adapter: str) -> dict[str, Any]:
        """The example as printed, made small."""
        given = dict(catalogue.find("methods", method).example)
        settings = given[method]["hyperparameters"]
        small = {"max_steps": STEPS, "batch_size": 5, "learning_rate": 5e-3, "max_length": 64}
        part = {"hyperparameters": {**settings, **small}, "adapter": {"type": adapter}}
        return {
            "model": "example/base",
            "training_file": "file-1",
            "validation_file": "file-1",
            "method": {"type": method, method: part},
            "ext": {"checkpoints": {"every_steps": 2}},
        }

    def run(self, order: RunOrder, name: str) -> list[Any]:
        workdir = self.home / name
        workdir.mkdir()
        events: list[Any] = []
        code = program.run(order, workdir, events.append, StopFlag())
        assert code == EXIT_DONE, [e.message for e in events if e.kind == "failure"]
        return events

    def whole(self, method: str, adapter: str = "lora") -> list[Any]:
        """The run that others are compared with, made once."""
        name = f"{method}-{adapter}"
        if name not in _RUNS:
            _RUNS[name] = self.run(self.order(method, adapter=adapter), name)
        return _RUNS[name]


_RUNS: dict[str, list[Any]] = {}


@pytest.fixture(scope="module")
def bench(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    yield Bench(tmp_path_factory.mktemp("battery"), base_folder)
    _RUNS.clear()


def losses(events: list[Any], name: str = "train_loss") -> dict[int, float]:
    return {e.step: e.values[name] for e in events if e.kind == "metrics" and name in e.values}


@every_method
def test_its_example_trains(bench: Bench, method: str) -> None:
    events = bench.whole(method)
    assert sorted(losses(events)) == [1, 2, 3, 4]
    held_out = losses(events, "valid_loss")
    assert held_out[STEPS] < held_out[0] - 1e-3


@every_method
def test_resumed_it_is_the_same_run(bench: Bench, method: str) -> None:
    whole = bench.whole(method)
    halfway = bench.home / f"{method}-lora/checkpoints/step-00000002/resume"
    order = bench.order(method).model_copy(update={"resume_path": str(halfway)})
    resumed = bench.run(order, f"{method}-resumed")
    after = {step: loss for step, loss in losses(whole).items() if step > 2}
    assert losses(resumed) == pytest.approx(after, abs=1e-6)


@every_method
def test_cut_otherwise_it_is_the_same_run(bench: Bench, method: str) -> None:
    cut = bench.run(bench.order(method, tokens=64), f"{method}-cut")
    for name in ("train_loss", "valid_loss"):
        assert losses(cut, name) == pytest.approx(losses(bench.whole(method), name), abs=1e-5)


@every_method
def test_packed_it_is_the_same_run(
    bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(trainer: Any) -> str:
        if "packed" not in trainer.task.layouts:
            pytest.skip("reads padded rows only")
        assert packing.switch_on(trainer.base)
        return "packed"

    monkeypatch.setattr(program.Trainer, "_layout", packed)
    found = bench.run(bench.order(method), f"{method}-packed")
    assert losses(found) == pytest.approx(losses(bench.whole(method)), abs=1e-5)


@every_method
def test_it_trains_whole_models_too(bench: Bench, method: str) -> None:
    events = bench.whole(method, "full")
    assert losses(events, "valid_loss")[STEPS] < losses(events, "valid_loss")[0]
    if method not in ("pretrain", "supervised", "distillation", "reward"):
        cut = bench.run(bench.order(method, adapter="full", tokens=64), f"{method}-full-cut")
        assert losses(cut) == pytest.approx(losses(events), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["ia3", "prompt", "prefix"])
@every_method
def test_it_trains_other_adapters(bench: Bench, method: str, adapter: str) -> None:
    """Among them some that lengthen every row in front."""
    tasks = catalogue.find("adapters", adapter).tasks
    wanted = catalogue.find("methods", method).tasks
    if tasks is not None and wanted is not None and not tasks & wanted:
        pytest.skip("this adapter does not go with this method's task")
    order = bench.order(method, adapter=adapter)
    held_out = losses(bench.run(order, f"{method}-{adapter}"), "valid_loss")
    assert held_out[STEPS] < held_out[0]


TWO_RANKS = [
    # The one that asks the model before each step tells most.
    pytest.param(name, marks=[] if name == "kto" else [pytest.mark.slow])
    for name in METHODS
]


@pytest.mark.parametrize("method", TWO_RANKS)
def test_two_ranks_have_the_losses_of_one(bench: Bench, method: str) -> None:
    workdir = bench.home / f"{method}-ranks"
    workdir.mkdir()
    order = bench.order(method, strategy="ddp", tokens=96)
    (workdir / "run.json").write_text(order.model_dump_json())
    reader, writer = os.pipe()
    with (workdir / "trainer.log").open("wb") as log, os.fdopen(reader, "rb") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunery.training.program", workdir, "--events-fd", str(writer)],
            pass_fds=[writer],
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        os.close(writer)
        events = [read_event(line) for line in lines]
    assert process.wait(60) == EXIT_DONE, (workdir / "trainer.log").read_text()
    for name in ("train_loss", "valid_loss"):
        assert losses(events, name) == pytest.approx(losses(bench.whole(method), name), abs=1e-5)


def test_noise_is_drawn_again_alike_after_a_resume(bench: Bench) -> None:
    order = bench.order("supervised")
    settings = {
        **order.spec.method.config,
        "neftune_noise_alpha": 10,
        "label_smoothing_factor": 0.1,
    }
    method = order.spec.method.model_copy(update={"config": settings})
    order = order.model_copy(update={"spec": order.spec.model_copy(update={"method": method})})
    noisy = losses(bench.run(order, "noisy"))
    assert noisy[4] != pytest.approx(losses(bench.whole("supervised"))[4], abs=1e-3)
    halfway = bench.home / "noisy/checkpoints/step-00000002/resume"
    resumed = bench.run(order.model_copy(update={"resume_path": str(halfway)}), "noisy-resumed")
    assert losses(resumed) == pytest.approx({step: noisy[step] for step in (3, 4)}, abs=1e-6)
