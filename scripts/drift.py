"""Fails when the tables in the code and the migrations tell different stories."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.util import CommandError

from core.db import migrate
from core.local.postgres import EmbeddedPostgres


def main() -> int:
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as postgres,
    ):
        migrate.upgrade(postgres.url)
        try:
            command.check(migrate.config(postgres.url))
        except CommandError as error:
            sys.stderr.write(f"{error}\nwrite a migration for it\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
