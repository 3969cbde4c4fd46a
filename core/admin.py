"""What an operator does at the server itself: projects and API keys.

    python -m core.admin projects create research
    python -m core.admin keys create --project research --scope jobs:read --scope files:read
    python -m core.admin keys list
    python -m core.admin keys revoke key_...

Results are JSON, one object a line; what went wrong is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from core.db import projects as table
from core.db.engine import Database
from core.projects.keys import SCOPES, USER_SCOPES, create_key
from core.settings import settings
from tunery.errors import AppError, Conflict, NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.db.tables import ApiKeyRow, ProjectRow

DEFAULT_PROJECT = "default"
EXIT_REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        shown = asyncio.run(_with_database(options))
    except AppError as error:
        hint = f" ({error.hint})" if error.hint else ""
        sys.stderr.write(f"error: {error}{hint}\n")
        return EXIT_REFUSED
    for entry in shown:
        sys.stdout.write(json.dumps(entry) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m core.admin", description=__doc__)
    shelves = parser.add_subparsers(required=True, metavar="keys|projects")
    keys = shelves.add_parser("keys").add_subparsers(required=True)
    create = keys.add_parser("create", help="make a key; its text is shown this once")
    create.add_argument("--project", default=DEFAULT_PROJECT, help="name or id; made if missing")
    create.add_argument("--name", default="key", help="to recognise it by")
    create.add_argument(
        "--scope", action="append", choices=SCOPES, help="may be repeated; default: all but admin"
    )
    create.add_argument("--days", type=float, help="after which it expires; default: never")
    create.set_defaults(run=_create_key)
    listing = keys.add_parser("list", help="all keys, without their secrets")
    listing.add_argument("--project", help="only this project's")
    listing.set_defaults(run=_list_keys)
    revoke = keys.add_parser("revoke", help="works within 30 seconds everywhere")
    revoke.add_argument("id", help="key_...")
    revoke.set_defaults(run=_revoke_key)
    projects = shelves.add_parser("projects").add_subparsers(required=True)
    project = projects.add_parser("create")
    project.add_argument("name")
    project.add_argument("--weight", type=float, default=1.0, help="share of the devices")
    project.set_defaults(run=_create_project)
    projects.add_parser("list").set_defaults(run=_list_projects)
    return parser


async def _with_database(options: argparse.Namespace) -> list[dict[str, Any]]:
    db = Database(settings().database_url.get_secret_value())
    try:
        shown: list[dict[str, Any]] = await options.run(db, options)
    finally:
        await db.close()
    return shown


async def _create_key(db: Database, options: argparse.Namespace) -> list[dict[str, Any]]:
    async with db.begin() as session:
        project = await table.find_project(session, options.project)
        if project is None:
            project = await table.insert_project(session, options.project, weight=1.0)
        if project is None:  # somebody else made it in this very moment
            project = await table.find_project(session, options.project)
    if project is None:
        raise NotFound(f"there is no project {options.project!r}")
    row, secret = await create_key(
        db,
        project,
        name=options.name,
        scopes=options.scope or USER_SCOPES,
        lifetime=None if options.days is None else timedelta(days=options.days),
    )
    return [{**_key(row), "project": project.public_id, "key": secret}]


async def _list_keys(db: Database, options: argparse.Namespace) -> list[dict[str, Any]]:
    async with db.session() as session:
        project = None
        if options.project is not None:
            project = await table.find_project(session, options.project)
            if project is None:
                raise NotFound(f"there is no project {options.project!r}")
        names = {row.id: row.public_id for row in await table.list_projects(session)}
        rows = await table.list_keys(session, None if project is None else project.id)
    return [{**_key(row), "project": names[row.project_id]} for row in rows]


async def _revoke_key(db: Database, options: argparse.Namespace) -> list[dict[str, Any]]:
    async with db.begin() as session:
        if not await table.revoke_key(session, options.id):
            raise NotFound(f"there is no key {options.id!r}", hint="`keys list` shows their ids")
    return [{"id": options.id, "revoked": True}]


async def _create_project(db: Database, options: argparse.Namespace) -> list[dict[str, Any]]:
    async with db.begin() as session:
        row = await table.insert_project(session, options.name, weight=options.weight)
    if row is None:
        raise Conflict(f"there is a project {options.name!r} already")
    return [_project(row)]


async def _list_projects(db: Database, options: argparse.Namespace) -> list[dict[str, Any]]:
    async with db.session() as session:
        return [_project(row) for row in await table.list_projects(session)]


def _project(row: ProjectRow) -> dict[str, Any]:
    return {"id": row.public_id, "name": row.name, "weight": row.weight}


def _key(row: ApiKeyRow) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "name": row.name,
        "scopes": row.scopes,
        "created_at": row.created_at.isoformat(),
        "expires_at": row.expires_at.isoformat() if row.expires_at else None,
        "revoked_at": row.revoked_at.isoformat() if row.revoked_at else None,
        "last_used_at": row.last_used_at.isoformat() if row.last_used_at else None,
    }


if __name__ == "__main__":
    sys.exit(main())
