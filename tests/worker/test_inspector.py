"""Questions of dry runs, answered by a real worker with a real tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from core.db import inspections
from tests.tunery.training.conftest import Lab, write_base_model
from tests.worker.conftest import until
from tunery.models import ModelStore
from tunery.models.importing import import_model
from tunery.request import parse_request
from tunery.resolve import resolve
from tunery.spec import DataFile

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worker.conftest import Farm

pytestmark = [pytest.mark.slow]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


async def asked(farm: Farm, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What a worker says of these rows."""
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    file = await farm.upload(data)
    training = DataFile(
        file_id=file.public_id,
        sha256=file.sha256,
        format="chat",
        rows=len(rows),
        size_bytes=len(data),
    )
    hyperparameters = {"max_length": 64}
    body = {
        "model": "bytes",
        "training_file": file.public_id,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }
    spec = resolve(parse_request(body), training=training, seed=7).spec
    async with farm.db.begin() as session:
        question = await inspections.ask(
            session,
            project_id=farm.project_id,
            queue="default",
            spec=spec.model_dump(mode="json") | more,
            training_file_id=file.id,
            validation_file_id=None,
        )

    async def said() -> dict[str, Any] | None:
        async with farm.db.session() as session:
            return await inspections.read(session, question)

    found = await until(said, 60)
    assert isinstance(found, dict)
    return found


async def test_a_worker_reads_files_with_the_base_models_tokenizer(
    farm: Farm, tmp_path: Path
) -> None:
    folder = write_base_model(Lab(tmp_path), tmp_path / "base")
    import_model(ModelStore(farm.settings.resolved_models_dir()), folder, "bytes")
    worker = await farm.worker()

    good = await asked(farm, [chat("What?", "That."), chat("Who?", "They.")])
    assert good["problems"] == []
    assert good["preflight"]["rows"] == 2
    assert 0 < good["preflight"]["trained_tokens"] < good["preflight"]["tokens"]

    # The reply begins after what fits.
    useless = await asked(farm, [chat("so long " * 40, "secret reply")])
    assert [problem["code"] for problem in useless["problems"]] == ["no_trainable_tokens"]
    assert "secret" not in json.dumps(useless)

    # A question that this version cannot read does not end the thread that answers.
    assert (await asked(farm, [chat("What?", "That.")], version=2))["preflight"] is None
    assert not list(farm.settings.resolved_scratch_dir().glob("inspection-*"))

    (farm.settings.resolved_models_dir() / "bytes" / "config.json").unlink()
    unknown = await asked(farm, [chat("What?", "That.")])
    assert [warning["code"] for warning in unknown["warnings"]] == ["data_not_inspected"]
    assert worker.popen.poll() is None
