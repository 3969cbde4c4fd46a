"""`tunery jobs ...`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tunery.cli import output
from tunery.cli.exits import STATUS, Exit
from tunery.cli.output import AsJson, Yes
from tunery.cli.request_file import is_local, override, read
from tunery.cli.watching import Watch, show
from tunery.client import Job, Tunery, WaitTimeout

app = typer.Typer(no_args_is_help=True, help="Create, watch and steer fine-tuning jobs.")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, ftjob-...")]
FollowFlag = Annotated[bool, typer.Option("--follow", "-F", help="Go on as more comes.")]


@app.command()
def create(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Job file: the request as YAML or JSON.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model.")] = None,
    training_file: Annotated[str | None, typer.Option(help="File id, or a path to upload.")] = None,
    validation_file: Annotated[str | None, typer.Option(help="The same, held out.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the result's name.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="path=value, such as lora.r=32.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Watch it once it is created.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create a job. Files named by path are uploaded first."""
    body = read(file) if file else {}
    flags = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
    }
    body.update({key: value for key, value in flags.items() if value is not None})
    body = override(body, set_ or [])
    with Tunery() as client:
        _upload_local(client, body, file.parent if file else Path())
        if dry_run:
            _show_rehearsal(client.jobs.dry_run(**body), as_json)
            return
        job = client.jobs.create(**body)
        if not watch:
            output.emit_json(job.model_dump()) if as_json else output.emit(job.id)
            output.say(f"watch it with: tunery jobs watch {job.id}")
            return
        _watch(client, job.id, as_json, None)


def _upload_local(client: Tunery, body: dict[str, Any], base: Path) -> None:
    """Replace paths by the ids of what is uploaded from them."""
    for member in ("training_file", "validation_file"):
        if member in body and is_local(body[member]):
            path = base / Path(body[member]).expanduser()
            if not path.is_file():
                raise typer.BadParameter(f"{member}: there is no file {path}")
            output.say(f"uploading {path} ({output.size(path.stat().st_size)})")
            body[member] = client.files.upload(path).id


def _show_rehearsal(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.emit_json(answer)
    else:
        resolved = answer.get("resolved") or {}
        for path, source in (resolved.get("sources") or {}).items():
            output.emit(f"{path}\t{_at(resolved.get('spec'), path)}\t{source}")
        estimate = answer.get("estimate") or {}
        if estimate.get("available"):
            seconds = estimate["seconds"]
            output.say(
                f"{estimate['steps']:,} steps, {estimate['train_tokens']:,} tokens, "
                f"{output.duration(seconds['low'])} to {output.duration(seconds['high'])} "
                f"({estimate['basis']})"
            )
    for finding in (answer.get("problems") or []) + (answer.get("warnings") or []):
        where = finding.get("path") or finding.get("param") or ""
        output.err().print(f"{finding.get('severity', 'error')}: {where}: {finding['message']}")
    if not answer.get("valid"):
        raise typer.Exit(Exit.REFUSED)


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(value, dict):
            return ""
        value = value.get(key)
    return value


@app.command("ls")
def list_(
    status: Annotated[str | None, typer.Option(help="Only those with this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only those of this base model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    filters = {"status": status, "model": model}
    with Tunery() as client:
        found: list[Job] = []
        for job in client.jobs.list(**{key: value for key, value in filters.items() if value}):
            found.append(job)
            if len(found) == limit:
                break
    output.rows(
        ("JOB", "STATUS", "METHOD", "MODEL", "STEP", "CREATED"),
        (
            (
                job.id,
                job.status,
                job.label,
                job.model,
                _steps(job),
                output.moment(job.created_at),
            )
            for job in found
        ),
        (job.model_dump() for job in found),
        as_json,
    )


def _steps(job: Job) -> str:
    step, total = job.progress.get("step"), job.progress.get("total_steps")
    return f"{step}/{total}" if total else ""


@app.command()
def get(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job."""
    with Tunery() as client:
        job = client.jobs.get(job_id)
    output.record(job.model_dump(), as_json, facts(job))


def facts(job: Job) -> dict[str, Any]:
    """What a person wants to know of a job."""
    usage = job.ext.get("usage") or {}
    return {
        "job": job.id,
        "status": job.status,
        "phase": job.phase if job.phase != job.status else None,
        "method": job.label,
        "model": job.model,
        "step": _steps(job) or None,
        "trained tokens": f"{job.trained_tokens:,}" if job.trained_tokens else None,
        "device time": output.duration(usage["gpu_seconds"]) if usage.get("gpu_seconds") else None,
        "created": output.moment(job.created_at),
        "finished": output.moment(job.finished_at),
        "result": job.fine_tuned_model,
        "error": f"{job.error.code}: {job.error.message}" if job.error else None,
        "hint": (job.ext.get("failure") or {}).get("hint"),
    }


@app.command()
def watch(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(help="Seconds; then exit code 12.")] = None,
    as_json: AsJson = False,
) -> None:
    """Follow a job to its end. Ctrl-C detaches, the job goes on.

    Exit code: 0 succeeded, 10 failed, 11 cancelled, 12 timed out.
    """
    with Tunery() as client:
        _watch(client, job_id, as_json, timeout)


def _watch(client: Tunery, job_id: str, as_json: bool, timeout_s: float | None) -> None:
    footer = f"Ctrl-C detaches; `tunery jobs cancel {job_id}` stops it"
    try:
        job = show(
            Watch(),
            client.jobs.follow(job_id, timeout_s=timeout_s),
            lambda: client.jobs.get(job_id),
            as_json=as_json,
            footer=footer,
        )
    except KeyboardInterrupt:
        output.say(f"detached; {job_id} goes on. Watch it again: tunery jobs watch {job_id}")
        return
    if not job.done:
        raise WaitTimeout(f"job {job_id} is still {job.status}")
    _report(job)


def _report(job: Job) -> None:
    if job.error:
        output.complain(
            f"{job.error.code}: {job.error.message}", (job.ext.get("failure") or {}).get("hint")
        )
    elif job.status == "succeeded":
        output.say(f"done: {job.fine_tuned_model}. Fetch it: tunery checkpoints get {job.id}")
    raise typer.Exit(STATUS[job.status])


@app.command()
def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(help="Seconds; then exit code 12.")] = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a job's end without showing it; exit codes as `watch`."""
    with Tunery() as client:
        job = client.jobs.wait(job_id, timeout)
    output.record(job.model_dump(), as_json, facts(job))
    raise typer.Exit(STATUS[job.status])


@app.command()
def events(job_id: JobId, follow: FollowFlag = False, as_json: AsJson = False) -> None:
    """What happened to a job, oldest first."""
    with Tunery() as client:
        found = client.jobs.follow(job_id) if follow else client.jobs.events(job_id)
        for event in found:
            if as_json:
                output.emit_json(event.model_dump())
            else:
                at = output.moment(event.created_at)
                output.emit(f"{at}\t{event.level}\t{event.kind}\t{event.message}")


@app.command()
def logs(
    job_id: JobId,
    tail: Annotated[int, typer.Option(min=1, max=10_000, help="Last lines.")] = 200,
    follow: FollowFlag = False,
) -> None:
    """The trainer's output."""
    with Tunery() as client:
        text, cursor = client.jobs.logs(job_id, tail)
        output.write(text)
        while follow:
            done = client.jobs.get(job_id).done
            text, cursor = client.jobs.logs(job_id, after=cursor)
            output.write(text)
            if done and not text:
                return
            time.sleep(0 if text else 1.0)


@app.command()
def metrics(
    job_id: JobId,
    key: Annotated[list[str] | None, typer.Option("--key", "-k", help="Only these.")] = None,
    as_json: AsJson = False,
) -> None:
    """Logged values as CSV, or with --json one object of series."""
    with Tunery() as client:
        if not as_json and not key:
            output.write(client.jobs.metrics_csv(job_id))
            return
        found = client.jobs.metrics(job_id, key)
    if as_json:
        output.emit_json(found.points)
        return
    for name, points in found.points.items():
        for step, value in points:
            output.emit(f"{name}\t{step}\t{value:g}")


@app.command()
def cancel(job_id: JobId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Stop a job for good; its checkpoints stay."""
    output.confirm(f"Cancel {job_id}?", yes)
    _move(job_id, "cancel", as_json)


@app.command()
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Checkpoint a job and free its device; `resume` goes on from there."""
    _move(job_id, "pause", as_json)


@app.command()
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a paused job go on."""
    _move(job_id, "resume", as_json)


def _move(job_id: str, verb: str, as_json: bool) -> None:
    with Tunery() as client:
        moves = {"cancel": client.jobs.cancel, "pause": client.jobs.pause}
        job = moves.get(verb, client.jobs.resume)(job_id)
    output.emit_json(job.model_dump()) if as_json else output.emit(f"{job.id}\t{job.phase}")
