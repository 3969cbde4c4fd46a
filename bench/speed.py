"""What the service costs a run: tokens per second in a job, against the library alone.

Both sides are the trainer's own `tokens_per_second`, over the same steps of the same spec: the
harmonic mean after the first twenty, which is all tokens over all time when steps are alike. Start
and final save are on neither side. A step takes more than 50 ms on two cores that do nothing else.

    python -m bench.speed [rounds]
"""

from __future__ import annotations

import os
import statistics
import sys
import time

from bench import harness, library, tiny
from bench.figures import Figure
from bench.service import ServiceUnderTest
from worker.environment import SHORT_SPIN

STEPS = 200
SKIPPED = 20
LOOK_S = 1.0
"""Between two looks at the job: each costs a connection and a query."""
FIGURES = [
    Figure(
        key="service-speed",
        what="training tokens per second under the service against our library without it",
        subject="service",
        baseline="library",
        unit="tokens per second",
        command="python -m bench.speed",
        at_least=0.98,
    )
]


def in_service(service: ServiceUnderTest, body: dict[str, object]) -> tuple[float, str]:
    """Tokens per second of a job, and its id."""
    job = service.create(body)
    ended = "select 1 from jobs where public_id = %s and finished_at is not null"
    while not service.query(ended, job):
        time.sleep(LOOK_S)
    service.wait(job)
    found = service.query(
        "select m.value from jobs join job_metrics m on m.job_id = jobs.id "
        "where public_id = %s and m.key = 'tokens_per_second' and m.step > %s",
        job,
        SKIPPED,
    )
    assert len(found) == STEPS - SKIPPED, f"{len(found)} points"
    return statistics.harmonic_mean([value for (value,) in found]), job


def alone(run: library.Run) -> float:
    """Tokens per second of a run without the service."""
    values = [event.values["tokens_per_second"] for event in run.metrics if event.step > SKIPPED]
    assert len(values) == STEPS - SKIPPED, f"{len(values)} points"
    return statistics.harmonic_mean(values)


def main(rounds: int) -> None:
    # On both sides, so that the service's cost is what is measured.
    os.environ.update(SHORT_SPIN)
    with ServiceUnderTest(worker=True) as service:
        model = tiny.add_tiny_model(service.home / "models", "small", hidden_size=192, layers=4)
        rows = tiny.jsonl(tiny.chats(600, turns=2))
        training = service.home / "train.jsonl"
        training.write_bytes(rows)
        body: dict[str, object] = {
            "model": "small",
            "training_file": service.upload(rows),
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"max_steps": STEPS, "batch_size": 8}},
            },
        }
        _, job = in_service(service, body)
        spec = library.spec_of(service, job)
        threads = os.cpu_count() or 1
        sides = {
            "library": lambda: alone(library.run(spec, model.path, training, threads)),
            "service": lambda: in_service(service, body)[0],
        }
        samples = harness.interleave(sides, rounds=rounds, say=harness.tell)
    harness.finish(*(harness.conclude(figure, samples, steps=STEPS) for figure in FIGURES))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
