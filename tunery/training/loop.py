"""The loop: every method, task, adapter and engine trains here.

Per step the host does arithmetic on small arrays and launches kernels; it reads the device only
where something is logged, saved or agreed on among ranks. What a step computes depends on spec,
seed and step number alone, which is what makes a resumed run the same run.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from tunery.errors import NonFiniteLoss
from tunery.training import batching, memory
from tunery.training.features import Switches
from tunery.training.meter import LOSS, Meter, Reading
from tunery.training.source import Drawn, Held
from tunery.training.types import AsksModel, Evaluated, Outcome, SeesSteps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerBase

    from tunery.training.batching import MicroBatch
    from tunery.training.control import StopFlag
    from tunery.training.engines import Engine
    from tunery.training.source import Draw, Examples, Source
    from tunery.training.store import TokenStore
    from tunery.training.types import Batch, Layout, LossOutput, Objective, TaskRuntime


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The run's arithmetic."""

    total_steps: int
    batch_size: int
    seed: int
    micro_batch_tokens: int
    layout: Layout = "rows"
    pad_id: int = 0
    logging_steps: int = 1
    evaluate_every: int | None = None
    """None: at the end of each epoch."""
    checkpoint_every: int | None = None
    metrics: tuple[str, ...] = ("loss",)
    switches: Switches = field(default_factory=Switches)
    baseline: bool = False
    """Whether the untuned base is measured too, before the first step."""
    calibration_steps: int = 0
    """Steps whose gradients the adapter's hook sees before a run's first update."""


@dataclass
class LoopState:
    """What a resumed run continues from, beside weights and optimizer. Plain JSON."""

    step: int = 0
    trained_tokens: int = 0
    earlier_updates: int = 0
    """Of the optimizer that an earlier run handed over: its moments have seen so many more."""
    budget: int = 0
    """Micro-batch tokens, as the memory allowed."""
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the steps since the last metric point."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Latest value of everything reported."""


class Reporter(Protocol):
    """Where the loop says what happens. Called on every rank; only rank 0's speaks."""

    def phase(self, name: str) -> None: ...

    def metrics(
        self,
        step: int,
        epoch: float,
        values: Mapping[str, float],
        trained_tokens: int,
        seconds_remaining: float | None,
    ) -> None: ...

    def warning(self, code: str, message: str, **data: Any) -> None: ...


class Saver(Protocol):
    """Where checkpoints go."""

    def save(self, state: LoopState, *, final: bool) -> None:
        """Called on every rank at a step boundary; may go on writing after it returns."""
        ...


class Loop:
    """One rank's steps.

    Args:
        train, valid, test: encoded data; `valid` and `test` may be None. `test` is measured once,
            after the last step.
        reference: context in which the model answers as the untuned base.
        state: a fresh one, or a resumed run's.
        tokenizer, labels: what evaluations are put into words with.
        source: of each step's examples; None draws rows of `train`.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        objective: Objective,
        task: TaskRuntime,
        train: TokenStore,
        valid: TokenStore | None,
        settings: LoopSettings,
        device: torch.device,
        reporter: Reporter,
        saver: Saver,
        stop: StopFlag,
        state: LoopState | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        labels: tuple[str, ...] = (),
        source: Source | None = None,
        test: TokenStore | None = None,
        reference: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.engine, self.objective, self.task = engine, objective, task
        self.tokenizer, self.labels = tokenizer, labels
        self.train, self.valid, self.test = train, valid, test
        self._reference = reference or nullcontext
        self.seen: dict[str, Evaluated] = {}
        """The latest evaluations: valid, test, base_valid, base_test."""
        self.source = source or Drawn(train, settings.batch_size, settings.seed)
        self.settings, self.device = settings, device
        self.reporter, self.saver, self.stop = reporter, saver, stop
        self.state = state or LoopState()
        self.state.budget = self.state.budget or settings.micro_batch_tokens
        self._meter = Meter()
        self._clock = _Clock()
        self._running: tuple[Examples, MicroBatch] | None = None
        self._norm: torch.Tensor | None = None
        self._draws: dict[int, Draw] = {}
        """Of the steps whose losses are not read yet."""

    def run(self) -> bool:
        """Train to the last step, or until told to stop; True when done.

        Raises:
            NonFiniteLoss: a loss was NaN or infinite; names step and rows.
            OutOfMemory: the smallest micro-batch does not fit.
        """
        if self.engine.rank == 0:
            self._meter.put_back(Reading(sums=dict(self.state.window)))
        if self.settings.switches.memory_probe and self.device.type == "cuda":
            self.probe()
        if self.state.step == 0 and self.settings.baseline:
            self._measure_base()
        if self.state.step == 0 and self.valid is not None:
            self._evaluate()
        else:
            self.reporter.phase("training")
        self.engine.model.train()
        if self.state.step == 0:
            self._calibrate()
        self._clock.start()
        while self.state.step < self.settings.total_steps:
            stop, checkpoint = self._step()
            done = self.state.step == self.settings.total_steps
            self._log(done)
            if self._evaluation_due(done):
                self._evaluate()
            if stop and not done:
                self._save(final=False)
                return False
            if not done and (checkpoint or self._due(self.settings.checkpoint_every)):
                self._save(final=False)
        if self.test is not None:
            self._evaluate(self.test, "test")
        self._save(final=True)
        return True

    # One step

    def _step(self) -> tuple[bool, bool]:
        """Returns whether to stop and whether to write a checkpoint, as all ranks agreed."""
        step = self.state.step
        draw = self._draws[step] = self.source.draw(step, self.state.budget)
        store, chosen = draw.examples, draw.chosen
        units = float(store.units[chosen].sum())
        while True:
            meter = Meter()
            with memory.attempt(alone=not self.engine.even) as tried:
                self._accumulate(store, chosen, units, meter)
            asked = (tried.failed, self.stop.stop, self.stop.take_checkpoint())
            failed, stop, checkpoint = self.engine.agree(*asked)
            if not failed:
                break
            self._shrink(tried.failed)
            if checkpoint:
                self.stop.request_checkpoint()
        self._norm = self.engine.step()
        self._meter.merge(meter)
        if self.engine.rank == 0:
            self._meter.put_back(Reading(sums={name: [*pair] for name, pair in draw.sums.items()}))
        self.state.step += 1
        self.state.trained_tokens += int(store.supervised[chosen].sum())
        self._clock.steps += 1
        self._clock.tokens += int(store.tokens[chosen].sum())
        if not self.settings.switches.deferred_metrics:
            self._meter.put_back(self._meter.read())
        return stop, checkpoint

    def _accumulate(self, store: Examples, chosen: np.ndarray, units: float, meter: Meter) -> None:
        torch.manual_seed(self._dropout_seed())
        self._announce(store, chosen)
        planned = self._plan(store, chosen)
        scale = 1 / units if units else 0.0
        with self._batches(store, planned) as batches:
            for number, (micro, batch) in enumerate(zip(planned, batches, strict=True)):
                out = self.objective.loss(self.engine.model, batch)
                loss = out.loss * (0.0 if micro.ghost else scale)
                self.engine.backward(loss, last=number == len(planned) - 1)
                if not micro.ghost:
                    self._note(meter, store, micro, out, number)

    def _announce(self, store: Examples, chosen: np.ndarray) -> None:
        """Tell the objective of the whole step, where it wants to know."""
        if isinstance(self.objective, SeesSteps):
            self.objective.begin(store[int(number)] for number in chosen)
        if not isinstance(self.objective, AsksModel):
            return
        asked = Held(
            self.objective.questions(store[int(number)] for number in chosen), lambda _: 1.0
        )
        if not len(asked):
            return
        while True:
            with memory.attempt(alone=not self.engine.even) as tried:
                mine = self._answers(self.objective, asked)
            (failed,) = self.engine.agree(tried.failed)
            if not failed:
                break
            self._shrink(tried.failed)
        told = [answer for answer in self.engine.gather(mine) if answer]
        self.objective.told([sum(values) for values in zip(*told, strict=True)])

    @torch.no_grad()
    def _answers(self, objective: AsksModel, asked: Held) -> list[float]:
        """This rank's sums; empty where it had nothing to ask."""
        total: torch.Tensor | None = None
        planned = self._plan(asked, np.arange(len(asked)))
        with self._batches(asked, planned) as batches:
            for micro, batch in zip(planned, batches, strict=True):
                sums = objective.answers(self.engine.model, batch)
                if not micro.ghost:
                    total = sums if total is None else total + sums
        return [] if total is None else total.tolist()

    def _note(
        self, meter: Meter, store: Examples, micro: MicroBatch, out: LossOutput, number: int
    ) -> None:
        units = float(store.units[list(micro.examples)].sum())
        meter.add(out, units, step=self.state.step, micro=number)

    def _calibrate(self) -> None:
        """Gradients before the first update, over the run's first examples, for the hook."""
        for step in range(self.settings.calibration_steps):
            draw = self.source.draw(step, self.state.budget)
            units = float(draw.examples.units[draw.chosen].sum())
            self._accumulate(draw.examples, draw.chosen, units, Meter())
            self.engine.calibrate()

    def _dropout_seed(self) -> int:
        """Of this rank's step: a step repeated, or resumed at, draws the same."""
        words = np.random.SeedSequence((self.settings.seed, self.state.step, self.engine.rank))
        return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _plan(self, store: Examples, chosen: np.ndarray) -> list[MicroBatch]:
        return batching.plan(
            chosen,
            store.longest,
            store.tokens,
            store.documents,
            budget=self.state.budget,
            layout=self.settings.layout,
            by_length=self.settings.switches.length_split,
            rank=self.engine.rank,
            world=self.engine.world,
            even=self.engine.even,
        )

    @contextmanager
    def _batches(self, store: Examples, planned: Sequence[MicroBatch]) -> Iterator[Iterator[Batch]]:
        """Micro-batches on the device; with prefetching, one is made while another is used."""
        if not (self.settings.switches.prefetch and self.device.type == "cuda"):
            yield (self._batch(store, micro) for micro in planned)
            return
        with ThreadPoolExecutor(1, "collate") as pool:
            yield self._ahead(pool, store, planned)

    def _ahead(
        self, pool: ThreadPoolExecutor, store: Examples, planned: Sequence[MicroBatch]
    ) -> Iterator[Batch]:
        ready = [pool.submit(self._collated, store, micro) for micro in planned[:2]]
        for number, micro in enumerate(planned):
            self._running = (store, micro)
            batch = ready.pop(0).result().to(self.device)
            if number + 2 < len(planned):
                ready.append(pool.submit(self._collated, store, planned[number + 2]))
            yield batch

    def _batch(self, store: Examples, micro: MicroBatch) -> Batch:
        self._running = (store, micro)
        return self._collated(store, micro).to(self.device)

    def _collated(self, store: Examples, micro: MicroBatch) -> Batch:
        examples = [store[number] for number in micro.examples]
        layout, pad_id = self.settings.layout, self.settings.pad_id
        batch = self.task.collate(examples, layout=layout, pad_id=pad_id)
        return batch.pinned() if self.device.type == "cuda" else batch

    # Memory

    def probe(self) -> None:
        """Run the heaviest micro-batch once and throw the result away: better now than at hour 3.

        Raises:
            OutOfMemory: not even one example fits.
        """
        heaviest = self.source.heaviest()
        if heaviest is None:
            return
        self.engine.model.train()
        while True:
            micro = self._plan(heaviest.examples, heaviest.chosen)[:1]
            with (
                memory.attempt(alone=not self.engine.even) as tried,
                self._batches(heaviest.examples, micro) as batches,
            ):
                for batch in batches:
                    out = self.objective.loss(self.engine.model, batch)
                    self.engine.backward(out.loss * 0.0, last=True)
            self.engine.discard()
            (failed,) = self.engine.agree(tried.failed)
            if not failed:
                return
            self._shrink(tried.failed)

    def _shrink(self, mine: bool) -> None:
        """Halve the micro-batch after one did not fit on some rank; the step starts over."""
        self.engine.discard()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        sizes = [size for size in self.engine.gather(self._size() if mine else None) if size]
        before = self.state.budget
        self.state.budget = min(memory.smaller_budget(before, *size) for size in sizes)
        self.reporter.warning(
            "micro_batch_halved",
            f"a micro-batch of {max(size[0] for size in sizes)} tokens did not fit; the step is "
            f"repeated in parts of at most {self.state.budget}, with the same examples",
            step=self.state.step,
            micro_batch_tokens_before=before,
            micro_batch_tokens=self.state.budget,
        )

    def _size(self) -> tuple[int, int, int]:
        """Positions, examples and longest document of the micro-batch that was running."""
        assert self._running is not None
        store, micro = self._running
        positions = batching.positions(
            micro.examples, store.longest, store.tokens, store.documents, self.settings.layout
        )
        return positions, len(micro.examples), int(store.longest[list(micro.examples)].max())

    # Metrics

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    @property
    def _epoch(self) -> float:
        return self.state.step / self.source.steps_per_epoch

    def _read(self) -> Reading:
        """All ranks' sums since the last metric point.

        Raises:
            NonFiniteLoss: one of them is not finite.
        """
        mine = self._meter.read()
        total = Reading()
        bad = []
        for rank, reading in enumerate(self.engine.gather(mine)):
            total.add(reading)
            bad += [(*reading.bad, rank)] if reading.bad else []
        if bad:
            raise self._non_finite(*min(bad))
        self._draws.clear()
        return total

    def _non_finite(self, step: int, micro: int, rank: int) -> NonFiniteLoss:
        store, chosen = self._draws[step].examples, self._draws[step].chosen
        planned = batching.plan(
            chosen,
            store.longest,
            store.tokens,
            store.documents,
            budget=self.state.budget,
            layout=self.settings.layout,
            by_length=self.settings.switches.length_split,
            rank=rank,
            world=self.engine.world,
            even=self.engine.even,
        )
        rows = sorted(self.source.row(store[number]) for number in planned[micro].examples)
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        return NonFiniteLoss(
            f"the loss of step {step + 1}, micro-batch {micro + 1} (rows {shown}) is not finite",
            hint="lower the learning rate, or look at these rows",
        )

    def _log(self, done: bool) -> None:
        if not (done or self._due(self.settings.logging_steps)):
            return
        means = self._read().means()
        assert self._norm is not None
        values = {"train_loss": means.pop(LOSS, 0.0)}
        values |= {f"train_{name}": value for name, value in means.items()}
        # The rate that the step was made with: the schedule has moved on already.
        values |= {"learning_rate": self._last_rate(), "grad_norm": float(self._norm)}
        self._report(values | self._clock.lap())

    def _last_rate(self) -> float:
        return self.engine.learning_rate_at(self.state.step - 1)

    def _report(self, values: dict[str, float]) -> None:
        self.state.metrics |= values
        left = self.settings.total_steps - self.state.step
        seconds = self._clock.seconds_per_step
        self.reporter.metrics(
            self.state.step,
            self._epoch,
            values,
            self.state.trained_tokens,
            None if seconds is None else left * seconds,
        )

    # Evaluation

    def _evaluation_due(self, done: bool) -> bool:
        if self.settings.evaluate_every is not None:
            return done or self._due(self.settings.evaluate_every)
        return done or self._due(self.source.steps_per_epoch)

    def _measure_base(self) -> None:
        with self._reference():
            self._evaluate(self.valid, "base_valid")
            self._evaluate(self.test, "base_test")

    def _evaluate(self, store: TokenStore | None = None, what: str = "valid") -> None:
        store = self.valid if what == "valid" else store
        if store is None:
            return
        with self._clock.paused():
            self.reporter.phase("evaluating")
            values = self.evaluate(store, what)
            self.reporter.phase("training")
        self._report(values)

    def evaluate(self, store: TokenStore, what: str = "valid") -> dict[str, float]:
        """Metrics over all of `store`, by all ranks, as `<what>_<name>`."""
        found = self.source.evaluate(store, self.state.budget)
        if found is not None:
            return {f"{what}_{name}": value for name, value in found.items()}
        seen = self.seen[what] = self.examine(store)
        metrics = self.task.metrics(self.settings.metrics, seen)
        named = {"loss": seen.loss, **seen.sums, **metrics}
        if "mean_token_accuracy" in named:
            named.pop("token_accuracy", None)
        return {f"{what}_{name}": value for name, value in named.items()}

    def examine(self, store: TokenStore) -> Evaluated:
        """What the model makes of all of `store`, gathered from all ranks."""
        self.engine.model.eval()
        while True:
            with memory.attempt(alone=not self.engine.even) as tried:
                mine = self._examined(store)
            (failed,) = self.engine.agree(tried.failed)
            if not failed:
                break
            self._shrink(tried.failed)
        self.engine.model.train()
        total, values = Reading(), dict[int, dict[str, np.ndarray]]()
        for reading, kept in self.engine.gather(mine):
            total.add(reading)
            values |= kept
        means = total.means()
        loss = means.pop(LOSS)
        outcomes = [Outcome(store[number], values[number]) for number in sorted(values)]
        return Evaluated(loss, means, outcomes, self.tokenizer, self.labels)

    @torch.no_grad()
    def _examined(self, store: TokenStore) -> tuple[Reading, dict[int, dict[str, np.ndarray]]]:
        """This rank's share: sums, and by example number what the task keeps of it."""
        meter = Meter()
        kept: dict[int, dict[str, np.ndarray]] = {}
        everything = np.arange(len(store))
        self._announce(store, everything)
        planned = self._plan(store, everything)
        with self._batches(store, planned) as batches:
            for micro, batch in zip(planned, batches, strict=True):
                out = self.objective.loss(self.engine.model, batch)
                outcomes = self.task.outcomes(self.engine.model, batch, out, self.settings.metrics)
                if micro.ghost:
                    continue
                self._note(meter, store, micro, out, 0)
                if outcomes:
                    kept |= _by_example(micro.examples, outcomes)
        reading = meter.read()
        reading.bad = None  # A validation loss may overflow without harm to the training.
        return reading, kept

    # Checkpoints

    def _save(self, *, final: bool) -> None:
        with self._clock.paused():
            window = self._read()
            self._meter.put_back(window)
            self.state.window = {name: list(pair) for name, pair in window.sums.items()}
            if self.engine.rank:
                self._meter.read()  # Rank 0 keeps the sums of all.
            self.reporter.phase("saving")
            self.saver.save(self.state, final=final)
            if not final:
                self.reporter.phase("training")


def _by_example(
    numbers: Sequence[int], outcomes: Mapping[str, torch.Tensor]
) -> dict[int, dict[str, np.ndarray]]:
    """Each example's row of every tensor, on the host."""
    host = {
        name: (value.float() if value.is_floating_point() else value).cpu().numpy()
        for name, value in outcomes.items()
    }
    return {
        number: {name: value[row] for name, value in host.items()}
        for row, number in enumerate(numbers)
    }


class _Clock:
    """Seconds and tokens of training alone; evaluations and checkpoints stop it."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0
        self._since = time.perf_counter()
        self._excluded = 0.0
        self.seconds_per_step: float | None = None

    def start(self) -> None:
        self._since, self._excluded = time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """Speed since the last lap."""
        seconds = max(time.perf_counter() - self._since - self._excluded, 1e-9)
        per_step = seconds / max(self.steps, 1)
        known = self.seconds_per_step
        # The first steps are slower than the rest; a moving mean forgets them.
        self.seconds_per_step = per_step if known is None else 0.8 * known + 0.2 * per_step
        speed = self.tokens / seconds
        self.steps = self.tokens = 0
        self.start()
        return {"tokens_per_second": speed, "step_seconds": per_step}
