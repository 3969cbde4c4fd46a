"""A run without the service: the trainer's program in a process of its own, as a script would."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.spec import TrainingSpec
from tunery.training.protocol import EXIT_DONE, MetricsEvent, RunOrder, read_event

if TYPE_CHECKING:
    from bench.service import ServiceUnderTest
    from tunery.training.protocol import Event


@dataclass(frozen=True)
class Run:
    """What one process said."""

    began: float
    """Unix seconds when the process was started."""
    events: list[Event]

    @property
    def metrics(self) -> list[MetricsEvent]:
        return [event for event in self.events if isinstance(event, MetricsEvent)]

    @property
    def first_step_s(self) -> float:
        """From starting the process to the end of the first optimizer step."""
        return self.metrics[0].at - self.began


def run(spec: TrainingSpec, model: Path, training: Path, threads: int) -> Run:
    """Train as `spec` says, in a process of its own, and return what it said.

    Raises:
        RuntimeError: it failed; the message ends with its output.
    """
    with tempfile.TemporaryDirectory(prefix="tunery-bench-run-") as folder:
        order = RunOrder(
            run="bench", spec=spec, base_model_path=str(model), training_path=str(training)
        )
        (Path(folder) / "run.json").write_text(order.model_dump_json(), encoding="utf-8")
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "tunery.training.program", folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        began = time.time()
        process = subprocess.Popen(
            [*command, "--events-fd", str(writing)],
            env=environment,
            pass_fds=[writing],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            events = [read_event(line) for line in stream]
        _, errors = process.communicate()
        if process.returncode != EXIT_DONE:
            raise RuntimeError(f"exit {process.returncode}: {errors[-2000:].decode()}")
    return Run(began, events)


def spec_of(service: ServiceUnderTest, job: str) -> TrainingSpec:
    """What the service resolved a job to."""
    ((spec,),) = service.query("select spec from jobs where public_id = %s", job)
    return TrainingSpec.model_validate(spec)
