"""Checkpoints in and out of the store, on a real Postgres."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from core.artifacts.publish import (
    Fenced,
    NamelessFiles,
    drop_old_resumes,
    fetch,
    metrics_csv,
    publish_checkpoint,
    restore,
    sweep,
    sweep_orphans,
    sweep_resumes,
)
from core.artifacts.stores import open_store
from core.db import checkpoints, claims, metrics
from tunery.errors import CheckpointCorrupt
from tunery.training.protocol import CheckpointEvent

if TYPE_CHECKING:
    from pathlib import Path

    from core.artifacts.stores import ArtifactStore
    from core.db.claims import Claim
    from core.settings import Settings
    from tests.core.conftest import Site


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings)


def made(folder: Path, step: int, *, final: bool = False) -> CheckpointEvent:
    """A folder as a trainer leaves it, and what it says of it."""
    path = folder / f"step-{step:08d}"
    (path / "export").mkdir(parents=True)
    (path / "resume").mkdir()
    (path / "export/adapter_model.safetensors").write_bytes(b"weights %d" % step)
    (path / "resume/optimizer.pt").write_bytes(b"moments %d" % step)
    return CheckpointEvent(
        run="r",
        at=time.time(),
        step=step,
        path=str(path),
        kinds=("export", "resume"),
        metrics={"valid_loss": 1.5},
        final=final,
    )


async def publish(site: Site, store: ArtifactStore, claim: Claim, event: CheckpointEvent) -> Any:
    return await publish_checkpoint(site.db, store, claim, event, name=f"ft:x:{event.step}")


async def keys(store: ArtifactStore, prefix: str = "jobs") -> set[str]:
    return {key async for key in store.list(prefix)}


async def claimed(site: Site) -> Claim:
    await site.submit()
    return await site.claimed()


async def test_files_lie_under_the_fencing_token_and_the_manifest_names_them_all(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    row = await publish(site, store, claim, made(tmp_path / "work", 3))
    prefix = f"jobs/{claim.public_id}/attempt-1-{claim.owner[:8]}/step-00000003"
    assert row.prefix == prefix
    assert await keys(store) == {
        f"{prefix}/export/adapter_model.safetensors",
        f"{prefix}/resume/optimizer.pt",
        f"{prefix}/manifest.json",
    }
    assert [(e["path"], e["sha256"]) for e in row.manifest] == [
        ("export/adapter_model.safetensors", hashlib.sha256(b"weights 3").hexdigest()),
        ("resume/optimizer.pt", hashlib.sha256(b"moments 3").hexdigest()),
    ]
    assert row.size_bytes == len(b"weights 3") + len(b"moments 3")


async def test_publishing_again_after_a_lost_answer_changes_nothing(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    event = made(tmp_path / "work", 3)
    first = await publish(site, store, claim, event)
    before = await keys(store)
    again = await publish(site, store, claim, event)
    assert (again.id, await keys(store)) == (first.id, before)


async def test_a_fenced_attempt_gets_no_row_and_its_files_are_swept(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    good = await publish(site, store, claim, made(tmp_path / "a", 3))
    await site.lapse(claim)
    with pytest.raises(Fenced):
        await publish(site, store, claim, made(tmp_path / "b", 6))
    async with site.db.session() as session:
        assert [row.step for row in await checkpoints.resumable(session, claim.job_id)] == [3]
    assert await sweep_orphans(site.db, store, older_than_s=0) == []  # still somebody's
    async with site.db.begin() as session:
        await session.execute(
            text("update jobs set state = 'queued', owner = null, lease_until = null")
        )
    assert await sweep_orphans(site.db, store) == []  # too fresh
    (orphan,) = await sweep_orphans(site.db, store, older_than_s=0)
    assert orphan.endswith("step-00000006")
    assert len(await keys(store, good.prefix)) == 3
    assert not await keys(store, orphan)


async def test_what_comes_back_is_what_went_in(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    row = await publish(site, store, claim, made(tmp_path / "work", 3))
    folder = await fetch(store, row.prefix, row.manifest, "export", tmp_path / "in")
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights 3"
    assert not (tmp_path / "in" / "resume").exists()


@pytest.mark.parametrize("damage", ["flipped", "longer", "missing"])
async def test_damaged_bytes_are_never_handed_out(
    site: Site, store: ArtifactStore, settings: Settings, tmp_path: Path, damage: str
) -> None:
    claim = await claimed(site)
    old = await publish(site, store, claim, made(tmp_path / "a", 3))
    new = await publish(site, store, claim, made(tmp_path / "b", 6))
    (file,) = (settings.home / "artifacts").rglob(f"{new.prefix}/resume/optimizer.pt")
    file.chmod(0o600)
    if damage == "flipped":
        file.write_bytes(b"Moments 6")
    elif damage == "longer":
        file.write_bytes(b"moments 6 and more")
    else:
        file.unlink()
    with pytest.raises(CheckpointCorrupt):
        await fetch(store, new.prefix, new.manifest, "resume", tmp_path / "direct")
    found = await restore(site.db, store, claim, tmp_path / "in")
    assert found is not None
    assert found[1] == 3
    assert (found[0] / "optimizer.pt").read_bytes() == b"moments 3"
    async with site.db.session() as session:
        good = await checkpoints.resumable(session, claim.job_id)
    assert [row.id for row in good] == [old.id]


async def test_without_a_sound_checkpoint_training_begins_at_the_beginning(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    assert await restore(site.db, store, claim, tmp_path / "in") is None


async def test_a_manifest_that_leads_out_of_its_folder_is_refused(
    store: ArtifactStore, tmp_path: Path
) -> None:
    manifest = [{"path": "resume/../../../evil", "bytes": 1, "sha256": "0", "role": "resume"}]
    with pytest.raises(CheckpointCorrupt, match="leads out"):
        await fetch(store, "jobs/x", manifest, "resume", tmp_path / "in" / "deep")
    assert not (tmp_path / "evil").exists()


async def test_retention_keeps_every_export(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    rows = [await publish(site, store, claim, made(tmp_path / "w", step)) for step in (1, 2, 3)]
    assert await drop_old_resumes(site.db, store, claim, keep=2) == 1
    assert f"{rows[0].prefix}/resume/optimizer.pt" not in await keys(store)
    assert f"{rows[0].prefix}/export/adapter_model.safetensors" in await keys(store)
    assert f"{rows[1].prefix}/resume/optimizer.pt" in await keys(store)


async def test_what_retention_could_not_delete_is_swept(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    rows = [await publish(site, store, claim, made(tmp_path / "w", step)) for step in (1, 2)]
    async with site.db.begin() as session:  # and the store failed, or the worker died
        await checkpoints.mark_resume_dropped(session, rows[0].id)
    before = await keys(store)
    await sweep(site.db, store, NamelessFiles())
    assert before - await keys(store) == {f"{rows[0].prefix}/resume/optimizer.pt"}
    assert await sweep_resumes(site.db, store) == []


async def test_an_ended_jobs_resume_halves_are_swept_but_for_the_newest(
    site: Site, store: ArtifactStore, tmp_path: Path
) -> None:
    claim = await claimed(site)
    row = await publish(site, store, claim, made(tmp_path / "w", 1))
    newest = await publish(site, store, claim, made(tmp_path / "w", 2))
    await sweep(site.db, store, NamelessFiles())
    assert f"{row.prefix}/resume/optimizer.pt" in await keys(store)
    await site.may("cancel", claim.public_id)
    await site.lapse(claim)
    await site.does(claims.reap)
    await sweep(site.db, store, NamelessFiles())
    assert f"{row.prefix}/resume/optimizer.pt" not in await keys(store)
    assert f"{row.prefix}/export/adapter_model.safetensors" in await keys(store)
    assert f"{newest.prefix}/resume/optimizer.pt" in await keys(store)


async def test_the_result_file_has_openais_columns_first(site: Site) -> None:
    claim = await claimed(site)
    points = [
        (1, {"train_loss": 2.0, "train_mean_token_accuracy": 0.5, "learning_rate": 0.1}),
        (2, {"train_loss": 1.0, "valid_loss": 1.25, "grad_norm": 3.0}),
    ]
    await site.does(metrics.record, claim.job_id, claim.attempt, points)
    table = (await metrics_csv(site.db, claim.job_id)).decode().splitlines()
    assert table == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"
        "grad_norm,learning_rate",
        "1,2.0,0.5,,,,0.1",
        "2,1.0,,1.25,,3.0,",
    ]


async def test_bytes_without_a_row_go_after_a_day(site: Site, store: ArtifactStore) -> None:
    async def content() -> Any:
        yield b"bytes"

    now = 0.0
    nameless = NamelessFiles(lambda: now)
    async with site.db.begin() as session:
        named = await session.scalar(text("select store_key from files"))
    for key in (named, "files/1/file-crashed", "files/1/file-being-written"):
        await store.put(key, content())
    assert await nameless.sweep(site.db, store) == []
    now = 86_399.0
    async with site.db.begin() as session:
        await session.execute(
            text(
                "insert into files (public_id, project_id, filename, purpose, status, size_bytes,"
                " sha256, store_key, content_type, suffix) select 'file-b', project_id, 'f',"
                " purpose, status, 5, sha256, 'files/1/file-being-written', content_type, suffix"
                " from files limit 1"
            )
        )
    assert await nameless.sweep(site.db, store) == []
    now = 86_400.0
    assert await nameless.sweep(site.db, store) == ["files/1/file-crashed"]
    assert await keys(store, "files") == {named, "files/1/file-being-written"}
