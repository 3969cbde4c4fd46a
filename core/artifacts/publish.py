"""Checkpoints on their way into the store and back.

    jobs/{job}/attempt-{n}-{owner8}/step-{n:08d}/export|resume/...    first
    jobs/{job}/attempt-{n}-{owner8}/step-{n:08d}/manifest.json        last, and only once
    one row in `checkpoints`, if the claim still lives                then it exists

The path holds the fencing token, so two live attempts never write the same key. What has no row is
nobody's checkpoint: `sweep_orphans` removes it a day later. What comes back is hashed on the way
in and compared before anybody loads it.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from core.artifacts.manifest import as_json, build, canonical
from core.db import attempts, checkpoints, claims, events, metrics
from tunery.errors import CheckpointCorrupt, Conflict, NotFound, WorkerLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from core.artifacts.stores import ArtifactStore
    from core.db.claims import Claim
    from core.db.engine import Database
    from core.db.tables import CheckpointRow
    from tunery.training.protocol import CheckpointEvent

log = structlog.get_logger()

ORPHAN_AGE_S = 86_400.0
_PAGE = 1000
OPENAI_COLUMNS = {
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
"""The result file's first columns after `step`, and the metric that each shows."""

_STEP_PREFIX = re.compile(r"jobs/(?P<job>[^/]+)/attempt-\d+-[0-9a-f]+/step-\d+")


class Fenced(WorkerLost):
    """The claim is not ours any more: nothing may be written."""

    default_code = "fenced"


def step_prefix(claim: Claim, step: int) -> str:
    """Where the files of one checkpoint of one attempt lie."""
    return f"jobs/{claim.public_id}/attempt-{claim.attempt}-{claim.owner[:8]}/step-{step:08d}"


async def publish_checkpoint(
    db: Database, store: ArtifactStore, claim: Claim, event: CheckpointEvent, *, name: str
) -> CheckpointRow:
    """Upload a complete checkpoint folder and make it exist. May be repeated after a failure.

    Args:
        name: what the checkpoint is called, `ft:...:ckpt-step-<n>`.

    Raises:
        Fenced: the claim is not alive any more; what was uploaded is an orphan.
        StoreUnavailable, ServiceUnavailable: try again.
    """
    folder = Path(event.path)
    prefix = step_prefix(claim, event.step)
    entries = await asyncio.to_thread(build, folder)
    for entry in entries:
        await put_once(store, f"{prefix}/{entry.path}", folder / entry.path)
    rows = as_json(entries)
    document = {
        "version": 1,
        "job": claim.public_id,
        "attempt": claim.attempt,
        "step": event.step,
        "kinds": list(event.kinds),
        "gpus": claim.gpus,
        "spec_sha256": hashlib.sha256(canonical(claim.spec)).hexdigest(),
        "files": rows,
    }
    await put_once(store, f"{prefix}/manifest.json", _chunks(canonical(document)))
    async with db.begin() as session:
        row = await checkpoints.insert(
            session,
            claim,
            step=event.step,
            kinds=event.kinds,
            prefix=prefix,
            manifest=rows,
            size_bytes=sum(entry.bytes for entry in entries),
            metrics=event.metrics,
            name=name,
            final=event.final,
        )
        if row is None:
            raise Fenced(f"attempt {claim.attempt} of {claim.public_id} is over")
        await events.append(
            session,
            claim.job_id,
            attempt=claim.attempt,
            kind="checkpoint",
            message=f"Checkpoint created at step {event.step}",
            data={"step": event.step, "checkpoint": row.public_id, "final": event.final},
        )
    return row


async def put_once(store: ArtifactStore, key: str, data: Path | AsyncIterator[bytes]) -> None:
    """Write a key that is ours alone. It may be there: from us, before a failure, and whole.

    Raises:
        StoreUnavailable: try again.
    """
    try:
        await store.put(key, data)
    except Conflict:
        log.info("artifact.already_there", key=key)


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def fetch(
    store: ArtifactStore,
    prefix: str,
    manifest: Sequence[Mapping[str, Any]],
    half: str,
    into: Path,
) -> Path:
    """Download one half of a checkpoint, `export` or `resume`, verified; returns its folder.

    Raises:
        CheckpointCorrupt: a file is missing, or its bytes are not those that were published.
        StoreUnavailable: try again.
    """
    wanted = [entry for entry in manifest if entry["path"].startswith(f"{half}/")]
    if not wanted:
        raise CheckpointCorrupt(f"the checkpoint at {prefix} has no {half} files")
    for entry in wanted:
        target = into / entry["path"]
        if not target.resolve().is_relative_to(into.resolve()):
            raise CheckpointCorrupt(f"{entry['path']} leads out of its checkpoint")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = await download(store, f"{prefix}/{entry['path']}", target)
        except NotFound as error:
            raise CheckpointCorrupt(f"{prefix}/{entry['path']} is missing") from error
        if found != entry["sha256"]:
            target.unlink()
            raise CheckpointCorrupt(f"{prefix}/{entry['path']} does not match its hash")
    return into / half


async def download(store: ArtifactStore, key: str, target: Path) -> str:
    """Write a key's bytes to a file; returns their SHA-256.

    Raises:
        NotFound: no such key.
        StoreUnavailable: try again.
    """
    digest = hashlib.sha256()
    with target.open("wb") as file:
        async for chunk in store.get(key):
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
    return digest.hexdigest()


async def fetch_resume(store: ArtifactStore, row: CheckpointRow, into: Path) -> Path:
    """Download what an attempt continues from; every hash is verified before it returns.

    Raises:
        CheckpointCorrupt: see `fetch`.
        StoreUnavailable: try again.
    """
    return await fetch(store, row.prefix, row.manifest, "resume", into)


async def restore(
    db: Database, store: ArtifactStore, claim: Claim, into: Path
) -> tuple[Path, int] | None:
    """The newest sound resume checkpoint of the job and its step; None: begin at the beginning.

    A corrupt one is marked, noted in the job's history, and the next older one is tried.

    Raises:
        Fenced: the claim is not alive any more.
        StoreUnavailable, ServiceUnavailable: try again.
    """
    async with db.session() as session:
        rows = await checkpoints.resumable(session, claim.job_id)
    for row in rows:
        try:
            return await fetch_resume(store, row, into / f"checkpoint-{row.id}"), row.step
        except CheckpointCorrupt as error:
            log.warning("checkpoint.corrupt", job=claim.public_id, step=row.step, why=str(error))
            await _condemn(db, claim, row, error)
    return None


async def _condemn(
    db: Database, claim: Claim, row: CheckpointRow, error: CheckpointCorrupt
) -> None:
    async with db.begin() as session:
        if not await claims.holds(session, claim):
            raise Fenced(f"attempt {claim.attempt} of {claim.public_id} is over")
        await checkpoints.mark_corrupt(session, row.id)
        await events.append(
            session,
            claim.job_id,
            attempt=claim.attempt,
            kind="warning",
            level="warn",
            message=f"The checkpoint of step {row.step} is corrupt; an older one is used",
            data={"code": error.code, "step": row.step, "checkpoint": row.public_id},
        )


async def drop_old_resumes(db: Database, store: ArtifactStore, claim: Claim, keep: int) -> int:
    """Delete the resume halves of all but the `keep` most advanced checkpoints; how many.

    The row says so first: nobody resumes from what is half deleted. `sweep_resumes` deletes what
    a store that failed has kept.

    Raises:
        StoreUnavailable, ServiceUnavailable: some may be left.
    """
    async with db.begin() as session:
        if not await claims.holds(session, claim):
            return 0
        rows = await checkpoints.retention_candidates(session, claim.job_id, keep)
        for row in rows:
            await checkpoints.mark_resume_dropped(session, row.id)
    for row in rows:
        await store.delete_prefix(f"{row.prefix}/resume")
    return len(rows)


async def sweep_orphans(
    db: Database, store: ArtifactStore, *, older_than_s: float = ORPHAN_AGE_S
) -> list[str]:
    """Delete what attempts uploaded and no row names, of jobs that were quiet for so long.

    Returns the prefixes that were removed. Safe to run at any time: an attempt that still uploads
    belongs to a job whose last heartbeat is recent.
    """
    found: dict[str, str] = {}
    async for key in store.list("jobs"):
        match = _STEP_PREFIX.match(key)
        if match:
            found[match[0]] = match["job"]
    if not found:
        return []
    async with db.session() as session:
        named = await attempts.named_prefixes(session, list(found))
        lively = await attempts.lively_jobs(session, set(found.values()), within_s=older_than_s)
    orphans = [at for at, job in found.items() if at not in named and job not in lively]
    for prefix in orphans:
        await store.delete_prefix(prefix)
        log.info("checkpoint.orphan_removed", prefix=prefix)
    return orphans


async def sweep_resumes(db: Database, store: ArtifactStore) -> list[str]:
    """Delete resume halves that rows have given up and that are there still; returns the rows'
    prefixes. Whoever gave them up may have died, or met a store that failed."""
    found = set()
    async for key in store.list("jobs"):
        match = _STEP_PREFIX.match(key)
        if match and key.startswith("/resume/", match.end()):
            found.add(match[0])
    async with db.session() as session:
        dropped = sorted(await attempts.dropped_resumes(session, found))
    for prefix in dropped:
        await store.delete_prefix(f"{prefix}/resume")
        log.info("checkpoint.resume_removed", prefix=prefix)
    return dropped


class NamelessFiles:
    """Bytes under `files/` whose row was never written: its writer died between the two.

    A store does not tell how old a key is, so each is remembered from when it was first seen.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}

    async def sweep(
        self, db: Database, store: ArtifactStore, *, older_than_s: float = ORPHAN_AGE_S
    ) -> list[str]:
        """Delete what has had no row for so long; returns the keys. Call it now and then."""
        found = [key async for key in store.list("files")]
        nameless: set[str] = set()
        for start in range(0, len(found), _PAGE):
            page = found[start : start + _PAGE]
            async with db.session() as session:
                nameless |= set(page) - await attempts.named_files(session, page)
        now = self._clock()
        self._since = {key: self._since.get(key, now) for key in nameless}
        old = [key for key, since in self._since.items() if now - since >= older_than_s]
        for key in old:
            await store.delete(key)
            log.info("file.nameless_removed", key=key)
        return old


async def sweep(db: Database, store: ArtifactStore, nameless: NamelessFiles) -> None:
    """Remove what nobody will read again: orphans, files without a row, and resume halves of jobs
    that have ended.

    A failed job keeps its own: whoever raises its budget continues from them.
    """
    await sweep_orphans(db, store)
    await nameless.sweep(db, store)
    async with db.begin() as session:
        rows = await checkpoints.unresumable_ended(session)
        for row in rows:
            await checkpoints.mark_resume_dropped(session, row.id)
    await sweep_resumes(db, store)


async def metrics_csv(db: Database, job_id: int) -> bytes:
    """The result file: OpenAI's five columns, then ours by name; one line per step."""
    async with db.session() as session:
        keys = set(await metrics.latest(session, job_id))
        own = sorted(keys - set(OPENAI_COLUMNS.values()))
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["step", *OPENAI_COLUMNS, *own])
        async for step, values in metrics.rows(session, job_id):
            cells = [values.get(key, "") for key in (*OPENAI_COLUMNS.values(), *own)]
            writer.writerow([step, *cells])
    return table.getvalue().encode()
