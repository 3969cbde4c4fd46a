"""`python -m core.db.migrate`, as the compose file runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from core.db.migrate import is_current

if TYPE_CHECKING:
    import psycopg

    from core.local.postgres import EmbeddedPostgres


def test_the_command_migrates_the_database_of_the_settings_and_may_be_repeated(
    postgres: EmbeddedPostgres, administer: psycopg.Connection
) -> None:
    administer.execute("create database migrated_by_command")
    url = postgres.url_of("migrated_by_command")
    assert not is_current(url)
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-m", "core.db.migrate"],
            env=os.environ | {"TUNERY_DATABASE_URL": url},
            check=True,
            timeout=60,
        )
    assert is_current(url)
    administer.execute("drop database migrated_by_command with (force)")
