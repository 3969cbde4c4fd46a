"""`tunery train`: a run on this machine, without the service."""

from __future__ import annotations

import secrets
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live

from tunery.cli import output
from tunery.cli.exits import Exit
from tunery.cli.local_data import describe
from tunery.cli.local_run import Record, RunFolder, started
from tunery.cli.models import store
from tunery.cli.request_file import override, read
from tunery.cli.watching import Watch
from tunery.errors import InvalidConfig
from tunery.models import shape
from tunery.request import parse_request
from tunery.resolve import further_models, resolve
from tunery.spec import DataFile, TrainingSpec
from tunery.training import protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunery.cli.local_run import Trainer
    from tunery.training.protocol import Event, RunOrder

RUNS = Path("tunery-runs")


def train(
    file: Annotated[
        Path | None,
        typer.Argument(help="A job file with paths for its data, or a resolved spec."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="path=value, such as lora.r=32.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; by default tunery-runs/<time>.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder instead.")
    ] = None,
    training_file: Annotated[Path | None, typer.Option(help="Data, for a spec.")] = None,
    validation_file: Annotated[Path | None, typer.Option(help="Held-out data.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the spec only.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Train on this machine without the service; leaves the same artifacts.

    Ctrl-C stops at the next step with a checkpoint that `--resume` goes on from.
    Exit code: 0 done, 10 failed, 11 stopped.
    """
    if resume is not None:
        folder = RunFolder(resume)
        point = folder.resume_point()
        order = protocol.RunOrder.model_validate_json(folder.order.read_bytes())
        order = order.model_copy(
            update={"attempt": order.attempt + 1, "resume_path": str(point.resolve())}
        )
    elif file is None:
        raise typer.BadParameter("a job file or --resume is needed")
    else:
        paths = {"training": training_file, "validation": validation_file}
        folder = RunFolder(out or RUNS / time.strftime("%Y%m%d-%H%M%S"))
        order = order_of(file, set_ or [], paths, folder.path.name)
        if dry_run:
            output.emit_json(order.spec.model_dump(mode="json"))
            return
        folder.create()
    raise typer.Exit(_run(folder, order, as_json))


def order_of(file: Path, settings: list[str], paths: dict[str, Path | None], name: str) -> RunOrder:
    """What is to be run, from a job file or a spec.

    Raises:
        UserError: what the file asks for cannot be done.
    """
    body = read(file)
    if "version" in body or isinstance(body.get("data"), dict):
        return _from_spec(file, body, paths, name)
    body = override(body, settings)
    if "model" not in body or not (body.get("training_file") or paths["training"]):
        raise InvalidConfig(f"{file}: model and training_file are needed", code="missing_parameter")
    training = paths["training"] or file.parent / Path(body["training_file"]).expanduser()
    held_out = paths["validation"] or (
        file.parent / Path(body["validation_file"]).expanduser()
        if body.get("validation_file")
        else None
    )
    request = parse_request({**body, "training_file": training.name})
    asked = request.ext.evaluation.test_file
    test = file.parent / Path(asked).expanduser() if asked else None
    model, revision = base_model(request.model)
    resolved = resolve(
        request,
        training=describe(training),
        validation=describe(held_out) if held_out else None,
        test=describe(test) if test else None,
        shape=shape(model),
        revision=revision,
        seed=secrets.randbelow(2**31),
    )
    for warning in resolved.warnings:
        output.say(f"warning: {warning['path']}: {warning['message']}")
    return _order(resolved.spec, model, (training, held_out, test), name)


def _from_spec(
    file: Path, body: dict[str, Any], paths: dict[str, Path | None], name: str
) -> RunOrder:
    try:
        spec = TrainingSpec.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidConfig(f"{file}: {where}: {first['msg']}", param=where) from None
    training = _data_of(spec.data.training, paths["training"], file)
    held_out, test = spec.data.validation, spec.data.test
    files = (
        training,
        _data_of(held_out, paths["validation"], file) if held_out else None,
        _data_of(test, None, file) if test else None,
    )
    return _order(spec, base_model(spec.model.name, spec.model.revision)[0], files, name)


def _data_of(named: DataFile, given: Path | None, file: Path) -> Path:
    """The file that a spec names: given by option, or found beside the spec; its bytes decide."""
    path = given or file.parent / named.file_id
    if not path.is_file():
        raise InvalidConfig(
            f"the spec's data file {named.file_id} is not at {path}",
            hint="name it with --training-file or --validation-file",
        )
    found = describe(path)
    if found.sha256 != named.sha256:
        raise InvalidConfig(
            f"{path} is not the spec's data: its sha256 is {found.sha256[:12]}…, "
            f"the spec's {named.sha256[:12]}…"
        )
    return path


def base_model(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a base model, by path or by name, and its commit."""
    if (Path(name) / "config.json").is_file():
        return Path(name), None
    models = store()
    path = models.locate(name, revision)
    info = models.get(name)
    return path, info.revision if info else None


def _order(
    spec: TrainingSpec, model: Path, files: tuple[Path, Path | None, Path | None], name: str
) -> RunOrder:
    training, held_out, test = files
    return protocol.RunOrder(
        run=name,
        spec=spec,
        base_model_path=str(model.resolve()),
        model_paths={
            ref.name: str(base_model(ref.name, ref.revision)[0].resolve())
            for ref in further_models(spec)
        },
        training_path=str(training.resolve()),
        validation_path=str(held_out.resolve()) if held_out else None,
        test_path=str(test.resolve()) if test else None,
    )


def _run(folder: RunFolder, order: RunOrder, as_json: bool) -> Exit:
    """Run to the end and say how it went."""
    watch = Watch(order.run)
    adapter = order.spec.adapter.type
    watch.title = f"{order.spec.method.type}-{adapter}  {order.spec.model.name}"
    record = Record(folder)
    with started(folder, order) as trainer:
        last = _follow(trainer, record, watch, folder, as_json)
        code = trainer.wait()
    record.write_metrics()
    return _report(folder, code, last)


def _follow(
    trainer: Trainer, record: Record, watch: Watch, folder: RunFolder, as_json: bool
) -> protocol.FailureEvent | protocol.DoneEvent | None:
    """Show and keep what the trainer says; returns its last word."""
    last: protocol.FailureEvent | protocol.DoneEvent | None = None
    fancy = sys.stdout.isatty() and not as_json
    console = Console(file=sys.stdout, highlight=False, markup=False)
    picture = Live(watch.render(""), console=console, refresh_per_second=4)
    with interrupts(trainer), picture if fancy else nullcontext():
        for event in trainer.events():
            record.add(event)
            _take(event, watch, folder)
            if isinstance(event, protocol.FailureEvent | protocol.DoneEvent):
                last = event
            if fancy:
                picture.update(watch.render("Ctrl-C stops with a checkpoint"))
            elif as_json:
                output.emit(event.model_dump_json())
            elif isinstance(event, protocol.MetricsEvent):
                output.emit(watch.line)
    return last


@contextmanager
def interrupts(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C asks the trainer to stop, a second one kills it; nothing here is torn apart."""
    asked = 0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            trainer.kill()
        else:
            trainer.ask_to_stop()
            output.say("stopping at the next step; Ctrl-C again ends it at once")

    before = [(number, signal.signal(number, ask)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _take(event: Event, watch: Watch, folder: RunFolder) -> None:
    match event:
        case protocol.PhaseEvent():
            watch.status = event.phase
        case protocol.StartEvent():
            watch.total_steps = event.total_steps
            watch.step = event.start_step
            trained, total = event.trainable_parameters, event.total_parameters
            watch.remark = f"{output.count(trained)} of {output.count(total)} parameters train"
        case protocol.MetricsEvent():
            watch.measure(event.step, event.values)
            watch.seconds_remaining = event.seconds_remaining
        case protocol.CheckpointEvent():
            folder.point_to(Path(event.path))
            watch.remark = f"checkpoint of step {event.step} saved"
        case protocol.WarningEvent():
            watch.remark = event.message
            output.say(f"warning: {event.message}")
        case _:
            pass


def _report(
    folder: RunFolder, code: int, last: protocol.FailureEvent | protocol.DoneEvent | None
) -> Exit:
    if code == protocol.EXIT_STOPPED:
        output.say(f"stopped; go on with: tunery train --resume {folder.path}")
        return Exit.CANCELLED
    if code != protocol.EXIT_DONE:
        failed = isinstance(last, protocol.FailureEvent)
        message = f"{last.code}: {last.message}" if failed else f"the trainer ended with {code}"  # type: ignore[union-attr]
        hint = last.hint if isinstance(last, protocol.FailureEvent) else None
        output.complain(message, hint or f"its output is in {folder.path}/trainer.log")
        return Exit.FAILED
    output.say(f"adapter     {folder.adapter}  (PeftModel.from_pretrained loads it)")
    output.say(f"metrics     {folder.metrics}")
    output.say(f"everything  {folder.path}")
    return Exit.OK
