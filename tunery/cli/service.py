"""`tunery up`, `status`, `down` and `keys`: the service itself, on this machine.

The service's code is not ours to import; its programs are started by name. `exec` leaves the
terminal, its signals and the exit code to them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tunery.cli import output
from tunery.cli.exits import Exit
from tunery.cli.output import AsJson, Yes
from tunery.client.credentials import home
from tunery.errors import NotSupported, ServiceUnavailable

keys = typer.Typer(no_args_is_help=True, help="API keys; works at the server itself.")

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of all state; TUNERY_HOME or ~/.tunery.")
]


def up(
    home: Home = None,
    port: Annotated[
        int | None, typer.Option(help="Of the API; 0 takes any free one. Default 8300.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole service on this machine until Ctrl-C."""
    arguments = [] if port is None else ["--port", str(port)]
    _become("worker.local", "up", home, as_json, *arguments)


def status(home: Home = None, as_json: AsJson = False) -> None:
    """Say whether a service runs on this machine, and its parts. Exit code 7 when none does."""
    _become("worker.local", "status", home, as_json)


def down(home: Home = None) -> None:
    """Stop the service that runs on this machine; running jobs are checkpointed first."""
    _become("worker.local", "down", home, False)


def _become(module: str, command: str, home: Path | None, as_json: bool, *more: str) -> None:
    _require(module)
    arguments = [command, *more]
    if home is not None:
        arguments += ["--home", str(home)]
    if as_json:
        arguments.append("--json")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def _require(module: str) -> None:
    """Refuse early where only the client is installed.

    Raises:
        NotSupported: the service's code is not here.
    """
    if importlib.util.find_spec(module.split(".")[0]) is None or not _has_server():
        raise NotSupported(
            "the service is not installed here",
            hint="pip install 'tunery[train,server,local]'",
        )


def _has_server() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("sqlalchemy", "fastapi"))


@keys.command("create")
def create_key(
    project: Annotated[str, typer.Option(help="Made if it is missing.")] = "default",
    name: Annotated[str, typer.Option(help="To recognise it by.")] = "key",
    scope: Annotated[
        list[str] | None, typer.Option(help="May be repeated; default: all but admin.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="After which it expires.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. Its text is shown this once."""
    arguments = ["create", "--project", project, "--name", name]
    arguments += [part for one in scope or () for part in ("--scope", one)]
    arguments += [] if days is None else ["--days", str(days)]
    row = _admin(arguments)[0]
    output.emit_json(row) if as_json else output.emit(row["key"])
    output.say(f"{row['id']} may: {', '.join(row['scopes'])}")


@keys.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only this project's.")] = None,
    as_json: AsJson = False,
) -> None:
    """List keys, without their secrets."""
    found = _admin(["list", *(["--project", project] if project else [])])
    output.rows(
        ("KEY", "NAME", "PROJECT", "SCOPES", "LAST USED", "REVOKED"),
        (
            (
                row["id"],
                row["name"],
                row["project"],
                ",".join(row["scopes"]),
                row["last_used_at"],
                row["revoked_at"],
            )
            for row in found
        ),
        found,
        as_json,
    )


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="key_...")], yes: Yes = False
) -> None:
    """Make a key worthless, within half a minute everywhere."""
    output.confirm(f"Revoke {key_id}?", yes)
    _admin(["revoke", key_id])
    output.say(f"revoked {key_id}")


def _admin(arguments: list[str]) -> list[dict[str, Any]]:
    _require("core.admin")
    command = [sys.executable, "-m", "core.admin", "keys", *arguments]
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:  # it has said why, on our stderr
        raise typer.Exit(Exit.USAGE if done.returncode == 2 else Exit.UNAVAILABLE)
    return [json.loads(line) for line in done.stdout.splitlines()]


def environment() -> dict[str, str]:
    """This environment, told where the database is: as it says itself, or the embedded one.

    Raises:
        ServiceUnavailable: neither is there.
    """
    if "TUNERY_DATABASE_URL" in os.environ:
        return dict(os.environ)
    note = home() / "run" / "service.json"
    try:
        url = json.loads(note.read_text(encoding="utf-8"))["database_url"]
    except (OSError, ValueError, KeyError) as error:
        raise ServiceUnavailable(
            "no database to keep keys in",
            hint="start the service with `tunery up`, or set TUNERY_DATABASE_URL",
        ) from error
    return {**os.environ, "TUNERY_DATABASE_URL": url}
