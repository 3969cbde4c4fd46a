"""How quickly one job is shown, against how quickly the same process says that it lives.

python -m bench.reads [rounds]
"""

from __future__ import annotations

import asyncio
import sys

from bench import harness, load, tiny
from bench.figures import Figure
from bench.service import ServiceUnderTest

SECONDS = 2.0
CLIENTS = 16
FIGURES = [
    Figure(
        key="get-job",
        what=f"GET of one job against GET /healthz, same process, {CLIENTS} clients",
        subject="job",
        baseline="healthz",
        unit="per second",
        command="python -m bench.reads",
        at_least=0.5,
    )
]


def answers_per_second(service: ServiceUnderTest, path: str) -> float:
    """GETs of `path` per second."""
    message = load.request("GET", path, service.key)
    return asyncio.run(load.rate(service.address, message, clients=CLIENTS, seconds=SECONDS))


def main(rounds: int) -> None:
    with ServiceUnderTest(worker=False) as service:
        tiny.add_tiny_model(service.home / "models")
        file = service.upload(tiny.jsonl(tiny.chats(20)))
        job = service.create({"model": "tiny", "training_file": file})
        sides = {
            "healthz": lambda: answers_per_second(service, "/healthz"),
            "job": lambda: answers_per_second(service, f"/v1/fine_tuning/jobs/{job}"),
        }
        samples = harness.interleave(sides, rounds=rounds, say=harness.tell)
    harness.finish(*(harness.conclude(f, samples, seconds=SECONDS) for f in FIGURES))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
