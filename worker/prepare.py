"""Getting an attempt's files onto this machine: data, base model, the checkpoint to go on from."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from core.artifacts import publish
from core.db import attempts, checkpoints
from tunery.errors import (
    CheckpointCorrupt,
    Gone,
    InvalidData,
    NotFound,
    TransientError,
)
from tunery.resolve import further_models
from tunery.spec import TrainingSpec
from tunery.training.protocol import RunOrder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from core.artifacts.stores import ArtifactStore
    from core.db.attempts import Inputs
    from core.db.claims import Claim
    from core.db.engine import Database
    from core.db.tables import CheckpointRow
    from tunery.models import ModelStore
    from tunery.spec import DataFile

T = TypeVar("T")
PATIENCE_S = 600.0
"""How long an absent store or database is waited for, while the lease is kept."""


async def patiently(action: Callable[[], Awaitable[T]], within_s: float | None = None) -> T:
    """Repeat what fails for reasons that time cures, with growing, jittered pauses.

    Args:
        within_s: how long; None: `PATIENCE_S`.

    Raises:
        TransientError: it was still failing when the patience was over. `Fenced` at once.
    """
    loop = asyncio.get_running_loop()
    give_up = loop.time() + (PATIENCE_S if within_s is None else within_s)
    pause_s = 0.2
    while True:
        try:
            return await action()
        except publish.Fenced:
            raise
        except TransientError:
            if loop.time() + pause_s > give_up:
                raise
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
        pause_s = min(10.0, pause_s * 2)


@dataclass(frozen=True)
class Prepared:
    """Everything is here."""

    order: RunOrder
    inputs: Inputs


async def prepare(
    db: Database, store: ArtifactStore, models: ModelStore, claim: Claim, scratch: Path, cache: Path
) -> Prepared:
    """Fetch and verify all that the trainer reads, into `scratch`.

    Raises:
        BaseModelUnavailable, Gone, InvalidData, CheckpointCorrupt: the job cannot run.
        StoreUnavailable, ServiceUnavailable: not now.
    """
    spec = TrainingSpec.model_validate(claim.spec)

    async def names() -> Inputs:
        async with db.session() as session:
            return await attempts.inputs(session, claim)

    inputs = await patiently(names)
    if inputs.training_gone or inputs.validation_gone:
        which = "training" if inputs.training_gone else "validation"
        raise Gone(f"the {which} file was deleted", param=f"{which}_file")
    base = await asyncio.to_thread(models.locate, spec.model.name, spec.model.revision)
    further = {
        ref.name: str(await asyncio.to_thread(models.locate, ref.name, ref.revision))
        for ref in further_models(spec)
    }
    training = await _data(store, inputs.training_key, spec.data.training, scratch, "training")
    validation = None
    if inputs.validation_key is not None and spec.data.validation is not None:
        validation = await _data(
            store, inputs.validation_key, spec.data.validation, scratch, "validation"
        )
    resume = await patiently(lambda: publish.restore(db, store, claim, scratch / "resume"))
    init = await _init(db, store, claim, spec, scratch) if resume is None else None
    order = RunOrder(
        run=claim.public_id,
        attempt=claim.attempt,
        spec=spec,
        base_model_path=str(base),
        model_paths=further,
        training_path=str(training),
        validation_path=None if validation is None else str(validation),
        resume_path=None if resume is None else str(resume[0]),
        init_path=None if init is None else str(init / "export"),
        init_resume_path=str(init / "resume") if init and (init / "resume").exists() else None,
        cache_dir=str(cache),
    )
    (scratch / "run.json").write_text(order.model_dump_json())
    return Prepared(order, inputs)


async def _data(store: ArtifactStore, key: str, file: DataFile, scratch: Path, name: str) -> Path:
    """Download a data file and hold it to the hash that the job was submitted with."""
    target = scratch / f"{name}{file.suffix}"
    try:
        found = await patiently(lambda: publish.download(store, key, target))
    except NotFound as error:
        raise Gone(f"the {name} file is no longer in the store", param=f"{name}_file") from error
    if found != file.sha256:
        raise InvalidData(
            f"the {name} file's bytes are not those that were uploaded",
            code=f"invalid_{name}_file",
            param=f"{name}_file",
        )
    return target


async def _init(
    db: Database, store: ArtifactStore, claim: Claim, spec: TrainingSpec, scratch: Path
) -> Path | None:
    """A folder with the export that the job starts from, when it names one.

    With the resume half beside it, when the optimizer is to go on as well.
    """
    if spec.init_from is None:
        return None
    wanted = spec.init_from.checkpoint

    async def look() -> CheckpointRow | None:
        async with db.session() as session:
            return await attempts.project_checkpoint(session, claim.project_id, wanted)

    row = await patiently(look)
    if row is None:
        raise Gone(f"the checkpoint {wanted} does not exist any more", param="ext.init_from")
    optimizer = spec.init_from.optimizer
    if optimizer and row.resume_dropped_at is not None:
        raise Gone(
            f"the optimizer's state of {wanted} is not kept any more",
            param="ext.init_from.optimizer",
        )
    folder = scratch / "init"
    try:
        for half in ("export", "resume") if optimizer else ("export",):
            await patiently(partial(publish.fetch, store, row.prefix, row.manifest, half, folder))
        return folder
    except CheckpointCorrupt:
        async with db.begin() as session:
            await checkpoints.mark_corrupt(session, row.id)
        raise
