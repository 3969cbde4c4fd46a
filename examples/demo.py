"""From nothing to a tuned adapter, through the service: what `make demo` runs.

Starts the embedded service unless one runs on this home, gets the base model, uploads the example
data, submits a LoRA job over HTTP, shows it, downloads and verifies the adapter, and has a fresh
process load it with PEFT and compare.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.local.process import spawn, stop
from tunery.cli import output
from tunery.cli.request_file import override, read
from tunery.cli.watching import Watch, show
from tunery.client import Job, Tunery, credentials
from tunery.errors import AppError, ServiceUnavailable
from worker.local.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent / "support-json"
STEPS = 7
START_PATIENCE_S = 180.0
STOP_PATIENCE_S = 60.0


class Story:
    """Tells what happens, with the time since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._step = 0

    def step(self, text: str) -> None:
        self._step += 1
        self.line(f"[{self._step}/{STEPS}] {text}")

    def line(self, text: str) -> None:
        took = time.monotonic() - self._began
        sys.stdout.write(f"{took:5.0f} s  {text}\n")
        sys.stdout.flush()


@contextmanager
def service(place: Place, story: Story) -> Iterator[None]:
    """A service on this home: the one that runs, or ours, which ends with the block."""
    if place.is_running():
        story.line("a service runs here already; it is used, and left running")
        yield
        return
    place.create()
    argv = [sys.executable, "-m", "worker.local", "up", "--home", str(place.home)]
    log = place.logs / "service.log"
    process = spawn(argv, log=log, death_signal=signal.SIGTERM)
    try:
        _wait(place, process, log)
        yield
    finally:
        story.line("stopping the service")
        stop(process, (signal.SIGTERM, STOP_PATIENCE_S))


def _wait(place: Place, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until its worker is started, which is last."""
    deadline = time.monotonic() + START_PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        parts = (place.read() or {}).get("parts", [])
        if any(part["name"] == "worker" for part in parts):
            return
        time.sleep(0.1)
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
    raise ServiceUnavailable("the service did not start: " + " ".join(last), hint=f"see {log}")


def upload(client: Tunery, path: Path) -> str:
    """The id of this file at the service: of an earlier upload of the same bytes, or a new one."""
    from tunery.models.store import sha256_of

    wanted = sha256_of(path)
    for file in client.files.list():
        if file.ext.get("sha256") == wanted and file.filename == path.name:
            return file.id
    return client.files.upload(path).id


def train(client: Tunery, body: dict[str, Any]) -> Job:
    """Submit the job and show it to its end; interrupted, it is cancelled."""
    job = client.jobs.create(**body)
    try:
        return show(
            Watch(),
            client.jobs.follow(job.id),
            lambda: client.jobs.get(job.id),
            footer="Ctrl-C cancels the demo",
        )
    except KeyboardInterrupt:
        client.jobs.cancel(job.id)
        raise


def run(story: Story, settings: list[str]) -> int:
    """The whole demo; returns the exit code."""
    place = Place(credentials.home())
    body = override(read(HERE / "job.yaml"), settings)
    story.step(f"base model {body['model']}")
    argv = [sys.executable, "-m", "tunery.cli.main", "models", "import", body["model"]]
    if subprocess.run(argv, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        return 1
    story.step(f"service on {place.home}")
    with service(place, story):
        note = place.read() or {}
        key = place.first_key.read_text(encoding="utf-8").strip()
        with Tunery(key, note["url"]) as client:
            return _through(client, story, place, body)


def _through(client: Tunery, story: Story, place: Place, body: dict[str, Any]) -> int:
    story.step(f"uploading {HERE.name}/train.jsonl and validation.jsonl to {client.base_url}")
    for member in ("training_file", "validation_file"):
        body[member] = upload(client, HERE / body[member])
    story.step("training a LoRA adapter (40 steps, about three minutes on two cores)")
    job = train(client, body)
    if job.status != "succeeded":
        reason = f": {job.error.code}: {job.error.message}" if job.error else ""
        story.line(f"the job {job.status}{reason}; logs: {place.logs}")
        return 1
    folder = place.home / "demo" / job.id
    story.step(f"downloading the adapter of {job.fine_tuned_model}")
    for file in client.checkpoints.download(job.id, folder):
        story.line(f"  {file.sha256[:16]}…  {output.size(file.bytes):>9}  {file.path}  verified")
    metrics = folder / "metrics.csv"
    metrics.write_text(client.jobs.metrics_csv(job.id), encoding="utf-8")
    story.step("loading it with PeftModel.from_pretrained in a fresh process")
    base = place.home / "models" / body["model"].replace("/", "--")
    compare = [sys.executable, str(HERE.parent / "compare.py"), str(base), str(folder)]
    # Word by word, a waiting thread that spins costs more than one that sleeps: five times on a
    # busy machine.
    patient = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    data = str(HERE / "validation.jsonl")
    if subprocess.run([*compare, data], env=patient, check=False).returncode != 0:
        return 1
    story.step("done")
    _farewell(place, folder, metrics, job)
    return 0


def _farewell(place: Place, folder: Path, metrics: Path, job: Job) -> None:
    sys.stdout.write(f"""
Where things are
  adapter    {folder}
  metrics    {metrics}
  base model {place.home / "models"}
  state      {place.home}   (jobs, files, logs; delete it to start afresh)

What to try next
  make up                                        the service, until Ctrl-C
  .venv/bin/tunery jobs get {job.id}
  .venv/bin/tunery jobs create -f {_short(HERE / "job.yaml")} --set lora.r=32 --watch
  .venv/bin/tunery methods ls                    what else can be trained
""")


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--set", action="append", default=[], help="changes the job, such as max_steps=10"
    )
    options = parser.parse_args()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    story = Story()
    try:
        return run(story, options.set)
    except AppError as error:
        story.line(f"error: {error}" + (f" ({error.hint})" if error.hint else ""))
        return 1
    except KeyboardInterrupt:
        story.line("interrupted; nothing is left running")
        return 130


if __name__ == "__main__":
    sys.exit(main())
