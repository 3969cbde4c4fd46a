"""A trainer that trains nothing and obeys `tunery.training.protocol`, with faults on request.

Its knobs stand in the spec's `method.config`:

    steps, step_s, checkpoint_every, checkpoint_s   the run's shape
    faults: {"<attempt>": {...}}                    what goes wrong in which attempt; "*" for all:
        at              step at which it happens (default: before the first)
        kill            signal number that it sends itself
        exit            exit code with which it leaves without a word
        hang            true: sleep for ever
        failure         fields of the FailureEvent with which it gives up
        flood_bytes     how much it prints first
        ignore_sigterm  true: SIGTERM changes nothing
        orphan          true: start a sleeper in a session of its own
        print           a line for the log
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tunery.training.protocol import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    CheckpointEvent,
    DoneEvent,
    FailureEvent,
    MetricsEvent,
    PhaseEvent,
    RunOrder,
    StartEvent,
)


class Trainer:
    def __init__(self, order: RunOrder, workdir: Path, events: int) -> None:
        self.order, self.workdir, self.events = order, workdir, events
        config = order.spec.method.config
        self.steps: int = config.get("steps", 10)
        self.step_s: float = config.get("step_s", 0.02)
        self.every: int = config.get("checkpoint_every", 5)
        self.checkpoint_s: float = config.get("checkpoint_s", 0.0)
        faults = config.get("faults", {})
        self.fault: dict[str, Any] = faults.get(str(order.attempt), faults.get("*", {}))
        self.stopping = self.saving = False

    def say(self, kind: type[Any], **fields: Any) -> None:
        event = kind(run=self.order.run, at=time.time(), **fields)
        os.write(self.events, event.model_dump_json().encode() + b"\n")

    def listen(self) -> None:
        def stop(*_: object) -> None:
            self.stopping = not self.fault.get("ignore_sigterm")

        def save(*_: object) -> None:
            self.saving = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR1, save)

    def start_step(self) -> int:
        if self.order.resume_path is None:
            return 0
        state = json.loads(Path(self.order.resume_path, "state.json").read_text())
        return int(state["step"])

    def checkpoint(self, step: int, *, final: bool = False) -> None:
        folder = self.workdir / "checkpoints" / f"step-{step:08d}"
        (folder / "export").mkdir(parents=True, exist_ok=True)
        (folder / "resume").mkdir(exist_ok=True)
        (folder / "export/adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "export/adapter_model.safetensors").write_bytes(b"weights of step %d" % step)
        (folder / "resume/state.json").write_text(json.dumps({"step": step}))
        time.sleep(self.checkpoint_s)
        self.say(
            CheckpointEvent,
            step=step,
            path=str(folder),
            kinds=("export", "resume"),
            metrics={"train_loss": 1 / (1 + step)},
            final=final,
        )

    def misbehave(self) -> int | None:
        """Do what the fault says; an exit code when it ends the run."""
        fault = self.fault
        if "print" in fault:
            os.write(1, fault["print"].encode() + b"\n")
        if "flood_bytes" in fault:
            line = b"x" * 1023 + b"\n"
            for _ in range(fault["flood_bytes"] // len(line)):
                os.write(1, line)
        if fault.get("orphan"):
            subprocess.Popen(["sleep", "60"], start_new_session=True)
        if "kill" in fault:
            os.kill(os.getpid(), fault["kill"])
        if fault.get("hang"):
            while True:
                time.sleep(60)
        if "failure" in fault:
            self.say(FailureEvent, **fault["failure"])
            return EXIT_FAILED
        return fault.get("exit")

    def train(self) -> int:
        self.say(PhaseEvent, phase="preparing")
        first = self.start_step()
        self.say(
            StartEvent,
            total_steps=self.steps,
            start_step=first,
            trainable_parameters=10,
            total_parameters=100,
            examples=8,
            tokens_per_epoch=80,
            trained_tokens_per_epoch=40,
            features={"fake": True},
        )
        self.say(PhaseEvent, phase="training")
        for step in range(first + 1, self.steps + 1):
            if self.fault and self.fault.get("at", first + 1) == step:
                code = self.misbehave()
                if code is not None:
                    return code
            time.sleep(self.step_s)
            self.say(
                MetricsEvent,
                step=step,
                epoch=step / self.steps,
                values={"train_loss": 1 / (1 + step), "tokens_per_second": 100.0},
                trained_tokens=4 * step,
                seconds_remaining=(self.steps - step) * self.step_s,
            )
            if self.stopping:
                self.checkpoint(step)
                return EXIT_STOPPED
            if step < self.steps and (self.saving or step % self.every == 0):
                self.saving = False
                self.checkpoint(step)
        self.say(PhaseEvent, phase="saving")
        self.checkpoint(self.steps, final=True)
        self.say(
            DoneEvent,
            step=self.steps,
            trained_tokens=4 * self.steps,
            metrics={"train_loss": 1 / (1 + self.steps)},
            peak_memory_bytes=1 << 20,
        )
        return EXIT_DONE


def launch(workdir: Path, events: int) -> int:
    order = RunOrder.model_validate_json((workdir / "run.json").read_text())
    # What a test wants to look at afterwards.
    kept = {name: value for name, value in os.environ.items()}
    (workdir / "seen.json").write_text(json.dumps({"environ": kept, "modules": list(sys.modules)}))
    trainer = Trainer(order, workdir, events)
    trainer.listen()
    return trainer.train()
