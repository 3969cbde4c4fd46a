from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.tunery.models.folders import write_gguf
from tunery.models import ModelStore
from tunery.models.importing import import_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TUNERY = [sys.executable, "-m", "tunery.cli.main"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a tiny base model, and a job file with its data."""
    folder = tmp_path_factory.mktemp("train")
    write_gguf(folder / "tiny.F32.gguf")
    import_model(ModelStore(folder / "home" / "models"), folder / "tiny.F32.gguf")
    rows = [json.dumps({"text": "ab " * (3 + i % 5) + "b" * (i % 3)}) for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    method = {"supervised": {"hyperparameters": {"batch_size": 4, "learning_rate": 0.01}}}
    body: dict[str, Any] = {
        "model": "tiny",
        "training_file": "rows.jsonl",
        "seed": 3,
        "method": {"type": "supervised", **method},
    }
    (folder / "job.yaml").write_text(json.dumps(body))  # JSON is YAML
    return folder


def _start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TUNERY_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TUNERY, "train", *arguments],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_job_file_is_trained_without_the_service(place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = _start(place, "job.yaml", "--set", "max_steps=5", "--set", "lora.r=2", "--out", "run")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "step 5/5" in out
    assert "PeftModel" in err
    with (place / "run" / "metrics.csv").open() as stream:
        points = list(csv.DictReader(stream))
    assert list(points[0])[:3] == ["step", "train_loss", "train_accuracy"]
    losses = [float(point["train_loss"]) for point in points if point["train_loss"]]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(place / "home" / "models" / "tiny")
    model = PeftModel.from_pretrained(base, str(place / "run" / "adapter"))
    assert model.peft_config["default"].r == 2  # type: ignore[attr-defined]
    # The folder is taken now.
    again = _start(place, "job.yaml", "--out", "run")
    assert again.communicate(timeout=60)[0] == ""
    assert again.returncode == 6


def test_a_teacher_is_found_by_its_name(place: Path) -> None:
    job = json.loads((place / "job.yaml").read_text())
    settings = {"batch_size": 4, "teacher_model": "tiny", "max_steps": 2}
    job["method"] = {"type": "distillation", "distillation": {"hyperparameters": settings}}
    (place / "distil.yaml").write_text(json.dumps(job))
    run = _start(place, "distil.yaml", "--out", "distilled")
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    job["method"]["distillation"]["hyperparameters"]["teacher_model"] = "nobody"
    (place / "orphan.yaml").write_text(json.dumps(job))
    run = _start(place, "orphan.yaml", "--out", "orphan")
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "nobody" in err


def test_ctrl_c_stops_with_a_checkpoint_and_resume_goes_on(place: Path) -> None:
    run = _start(place, "job.yaml", "--set", "max_steps=100000", "--out", "long")
    assert run.stdout is not None
    assert any(line.startswith("step 3/") for line in run.stdout)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 11, err
    assert "--resume long" in err
    stopped_at = int(sorted((place / "long" / "checkpoints").iterdir())[-1].name.split("-")[1])
    on = _start(place, "--resume", "long")
    assert on.stdout is not None
    first = next(line for line in on.stdout if line.startswith("step"))
    assert int(first.split("/")[0].split()[1]) > stopped_at
    on.send_signal(signal.SIGINT)
    on.communicate(timeout=60)
    assert on.returncode == 11


def test_what_cannot_be_trained_is_refused_before_anything_starts(place: Path) -> None:
    (place / "broken.jsonl").write_text('{"text": "ab"}\n{"text": \n')
    run = _start(place, "job.yaml", "--training-file", "broken.jsonl", "--out", "broken")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 3
    assert "line 2" in err
    assert not (place / "broken").exists()
    run = _start(place, "job.yaml", "--set", "model=tinny", "--out", "broken")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 4
    assert "'tiny'" in err


def test_a_dry_run_prints_a_spec_that_can_be_run(place: Path) -> None:
    dry = _start(place, "job.yaml", "--dry-run", "--set", "max_steps=2")
    out, err = dry.communicate(timeout=60)
    assert dry.returncode == 0, err
    (place / "spec.yaml").write_text(out)
    run = _start(place, "spec.yaml", "--out", "spec-run")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "step 2/2" in out
    (place / "other.jsonl").write_text('{"text": "ab"}\n' * 12)
    run = _start(place, "spec.yaml", "--training-file", "other.jsonl", "--out", "x")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 3
    assert "not the spec's data" in err
