"""How soon a job trains: POST to first step in a warm service, against a script started cold.

The service's moments are the database's: the claim, and when the first step's metrics were
written, which is up to half a second after the step. The script's is the step itself.

    python -m bench.start [rounds]
"""

from __future__ import annotations

import os
import sys
import time

from bench import harness, library, tiny
from bench.figures import Figure
from bench.service import ServiceUnderTest

_COMMAND = "python -m bench.start"
STEPS = 3
FIGURES = [
    Figure(
        key="start-warm",
        what="a cold script's time to its first optimizer step, against POST to first step in a "
        "warm service",
        subject="script",
        baseline="service",
        unit="s",
        command=_COMMAND,
        at_least=5,
    ),
    Figure(
        key="claim-to-step",
        what="claim to first optimizer step, cached small model, warm",
        subject="claimed",
        baseline="service",
        unit="s",
        command=_COMMAND,
        at_most=1.5,
        kind="value",
    ),
]


def moments(service: ServiceUnderTest, body: dict[str, object]) -> tuple[float, float, str]:
    """Seconds from POST and from claim to the first step, and the job's id."""
    posted = time.time()
    job = service.create(body)
    service.wait(job)
    ((claimed, stepped),) = service.query(
        "select extract(epoch from jobs.started_at)::float8, min(extract(epoch from m.at))::float8 "
        "from jobs join job_metrics m on m.job_id = jobs.id and m.step = 1 "
        "where public_id = %s group by jobs.id",
        job,
    )
    return stepped - posted, stepped - claimed, job


def main(rounds: int) -> None:
    with ServiceUnderTest(worker=True) as service:
        model = tiny.add_tiny_model(service.home / "models")
        rows = tiny.jsonl(tiny.chats(64))
        training = service.home / "train.jsonl"
        training.write_bytes(rows)
        hyperparameters = {"max_steps": STEPS, "batch_size": 4}
        body: dict[str, object] = {
            "model": "tiny",
            "training_file": service.upload(rows),
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": hyperparameters},
            },
        }
        _, _, job = moments(service, body)  # the worker is warm, the data tokenised once
        spec = library.spec_of(service, job)
        threads = os.cpu_count() or 1
        claimed: list[float] = []

        def in_service() -> float:
            since_post, since_claim, _ = moments(service, body)
            claimed.append(since_claim)
            return since_post

        def as_script() -> float:
            return library.run(spec, model.path, training, threads).first_step_s

        sides = {"service": in_service, "script": as_script}
        samples = harness.interleave(sides, rounds=rounds, say=harness.tell)
    samples["claimed"] = claimed[-rounds:]
    harness.finish(*(harness.conclude(figure, samples, steps=STEPS) for figure in FIGURES))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
