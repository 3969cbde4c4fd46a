"""The whole conversation in the words of the stock client, whichever version is on the path.

    python conversation.py <base url> <api key> <base model> <data file>

Run by test_clients.py, which plays the worker meanwhile. Prints what it saw as one JSON object.
"""

import json
import sys
import time
from typing import Any

import openai


def main(url: str, key: str, model: str, data: str) -> dict[str, Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    jobs = client.fine_tuning.jobs
    with open(data, "rb") as stream:
        file = client.files.create(file=stream, purpose="fine-tune")
    file = client.files.wait_for_processing(file.id, poll_interval=0.1)
    job = jobs.create(
        model=model, training_file=file.id, suffix="talk", hyperparameters={"n_epochs": 1}
    )
    until = time.monotonic() + 60
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < until, f"still {job.status}"
        time.sleep(0.1)
        job = jobs.retrieve(job.id)
    events = [event.message for event in jobs.list_events(job.id, limit=2)]
    checkpoints = [saved.step_number for saved in jobs.checkpoints.list(job.id, limit=1)]
    result = client.files.content(job.result_files[0]).read().decode()

    second = jobs.create(
        model=model,
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
    )
    moves = [second.status]
    for verb in ("pause", "resume", "cancel"):
        # 1.109 has no pause and resume of its own: its users call the paths.
        call = getattr(jobs, verb, None)
        moved = (
            call(second.id)
            if call
            else client.post(f"/fine_tuning/jobs/{second.id}/{verb}", cast_to=type(second))
        )
        moves.append(moved.status)
    refusals = []
    for attempt in (
        lambda: jobs.retrieve("ftjob-none"),
        lambda: jobs.create(model=model, training_file="file-none"),
        lambda: openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong").models.list(),
        lambda: client.models.delete(model),
    ):
        try:
            attempt()
        except openai.APIStatusError as error:
            refusals.append([type(error).__name__, error.code, bool(error.request_id)])
    assert job.fine_tuned_model is not None
    return {
        "version": openai.__version__,
        "file": [file.status, file.purpose],
        "status": job.status,
        "error": job.error,
        "listed": [found.id for found in jobs.list(limit=1)] == [second.id, job.id],
        "events": events,
        "checkpoints": checkpoints,
        "result": result,
        "moves": moves,
        "models": [found.owned_by for found in client.models.list()],
        "base": client.models.retrieve(model).id,
        "deleted": client.models.delete(job.fine_tuned_model).deleted,
        "refusals": refusals,
        "files": [found.id for found in client.files.list()].count(file.id),
        "file_deleted": client.files.delete(file.id).deleted,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))  # noqa: T201 - what its caller reads
