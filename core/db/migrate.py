"""Bringing a database to the schema of this version. Synchronous: run it in a thread.

`python -m core.db.migrate` does it for the database of the settings, and ends.
"""

from __future__ import annotations

import threading
from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from core.settings import settings

# Alembic keeps its context in module globals.
_ONE_AT_A_TIME = threading.Lock()


def config(database_url: str) -> Config:
    """Alembic's configuration, wherever the `migrations` package is installed."""
    spec = find_spec("migrations")
    assert spec is not None
    assert spec.origin is not None
    made = Config()
    made.set_main_option("script_location", str(Path(spec.origin).parent))
    made.attributes["database_url"] = database_url
    return made


def upgrade(database_url: str, revision: str = "head") -> None:
    """Apply what is missing. Several processes may call this at once; one works, the rest wait.

    Raises:
        sqlalchemy.exc.OperationalError: Postgres is away, or a lock was not to be had in time.
    """
    with _ONE_AT_A_TIME:
        command.upgrade(config(database_url), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Go back to `revision` ("base": an empty database). Drops data."""
    with _ONE_AT_A_TIME:
        command.downgrade(config(database_url), revision)


def is_current(database_url: str) -> bool:
    """Whether the database has exactly this version's schema."""
    head = ScriptDirectory.from_config(config(database_url)).get_current_head()
    engine = create_engine(database_url)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision() == head
    finally:
        engine.dispose()


if __name__ == "__main__":
    upgrade(settings().database_url.get_secret_value())
