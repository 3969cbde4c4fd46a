"""`tunery data ...`: look at data files before they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import output
from tunery.cli.exits import Exit
from tunery.cli.local_data import describe, held_out_report, report_of
from tunery.cli.output import AsJson

if TYPE_CHECKING:
    from tunery.data.validate import Report

app = typer.Typer(no_args_is_help=True, help="Check and preview data files on this machine.")

DataPath = Annotated[Path, typer.Argument(metavar="FILE", help="jsonl, jsonl.gz, csv or parquet.")]


@app.command()
def check(
    path: DataPath,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out data: its rows that FILE has too are named."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a file as the service does at upload. Exit code 3 when it cannot be trained on."""
    reports = [(path, report_of(path))]
    if validation is not None:
        reports.append((validation, held_out_report(validation, *reports[0])))
    for about, report in reports:
        _show(about, report, as_json)
    if not all(report.valid for _, report in reports):
        raise typer.Exit(Exit.REFUSED)


def _show(path: Path, report: Report, as_json: bool) -> None:
    if as_json:
        output.emit_json({"file": str(path), **report.as_json()})
    else:
        output.record(
            {
                "file": str(path),
                "valid": "yes" if report.valid else "no",
                "format": report.format,
                "rows": f"{report.rows:,}",
                "labels": ", ".join(report.labels) if report.labels else None,
            },
            False,
        )
        for problem in report.problems:
            where = f"line {problem['line']}: " if problem.get("line") else ""
            path_ = f"{problem['path']}: " if problem.get("path") else ""
            severity = problem.get("severity") or "error"
            output.emit(f"{severity}\t{where}{path_}{problem['message']}\t{problem['code']}")


@app.command()
def preview(
    path: DataPath,
    model: Annotated[str, typer.Option(help="Base model whose tokenizer is used.")],
    rows: Annotated[int, typer.Option(min=1, max=20, help="Rows to show.")] = 3,
    sample: Annotated[int, typer.Option(min=1, help="Rows to look at for the summary.")] = 200,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="path=value, as for jobs create.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model will see them; the tokens that are trained are marked."""
    found = _preview(path, model, rows, sample, set_ or [])
    if as_json:
        output.emit_json(found.model_dump(mode="json"))
        return
    from rich.console import Console

    from tunery.training.preview import rendered

    console = Console(highlight=False, markup=False)
    for row in found.rows:
        for document in row.documents:
            output.say(f"row {row.row}: {document.trained_tokens} tokens are trained")
            if console.is_terminal:
                console.print(rendered(document))
            else:
                output.emit("".join(_marked(*segment) for segment in document.segments()))
    for problem in found.problems:
        output.say(f"row {problem.row}: {problem.code}: {problem.message}")
    found.check()


def _marked(text: str, trained: bool) -> str:
    return f"[[{text}]]" if trained else text


def _preview(path: Path, model: str, show: int, sample: int, settings: list[str]) -> Any:
    from tunery.cli.request_file import override
    from tunery.cli.train import base_model
    from tunery.models import shape
    from tunery.request import parse_request
    from tunery.resolve import resolve
    from tunery.training.preview import sampled

    body = override({"model": model, "training_file": path.name}, settings)
    data = describe(path)
    folder, _ = base_model(model)
    spec = resolve(parse_request(body), training=data, shape=shape(folder), seed=0).spec
    return sampled(spec, data, path, folder, sample=sample, show=show)
