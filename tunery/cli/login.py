"""`tunery login`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tunery.cli import output
from tunery.cli.exits import Exit
from tunery.client import Tunery, credentials


def login(
    url: Annotated[str, typer.Argument(help="The service's address.")] = credentials.DEFAULT_URL,
    key: Annotated[
        str | None,
        typer.Option(
            envvar="TUNERY_API_KEY",
            help="The API key; asked for, or read from stdin, when it is not given.",
        ),
    ] = None,
) -> None:
    """Keep a service's address and key for later commands."""
    secret = key or _ask()
    with Tunery(secret, url) as client:
        next(client.jobs.list(), None)  # a key that does not work is not kept
    path = credentials.store(url, secret)
    output.say(f"logged in to {url}; kept in {path}")


def _ask() -> str:
    if sys.stdin.isatty() and not output.manner.no_input:
        return str(typer.prompt("API key", hide_input=True, err=True))
    secret = "" if sys.stdin.isatty() else sys.stdin.readline().strip()
    if not secret:
        output.complain("no API key was given", "pass it as --key, or on stdin")
        raise typer.Exit(Exit.USAGE)
    return secret
