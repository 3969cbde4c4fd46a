"""The migrations build exactly what `core.db.tables` says, and can be undone."""

from __future__ import annotations

import re
import subprocess
import sys

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import OperationalError

from core.db.migrate import config, downgrade, is_current, upgrade
from core.db.tables import Base


@pytest.fixture
def empty_url(postgres, administer):
    administer.execute("create database empty_one")
    yield postgres.url_of("empty_one")
    administer.execute("drop database empty_one with (force)")


def drift(url: str) -> list[object]:
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        found = compare_metadata(context, Base.metadata)
    engine.dispose()
    return found


def test_the_migrations_build_the_tables_that_the_code_describes(database_url):
    assert drift(database_url) == []
    command.check(config(database_url))


def test_drift_would_be_noticed(database_url):
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("alter table workers drop column host"))
    engine.dispose()
    assert len(drift(database_url)) == 1


def test_check_constraints_are_those_of_the_code(database_url):
    # Alembic does not compare them.
    def tidy(sql: str) -> str:
        sql = re.sub(r"::\w+(\[\])?|[\s()]", "", sql.lower())
        return sql.replace("=anyarray[", "in").replace("]", "")

    engine = create_engine(database_url)
    found = {c["name"]: tidy(c["sqltext"]) for c in inspect(engine).get_check_constraints("jobs")}
    engine.dispose()
    wanted = {
        c.name: tidy(str(c.sqltext))
        for c in Base.metadata.tables["jobs"].constraints
        if hasattr(c, "sqltext")
    }
    assert len(wanted) == 5
    assert found == wanted


def test_downgrade_leaves_nothing_and_upgrade_brings_all_back(empty_url):
    assert not is_current(empty_url)
    upgrade(empty_url)
    assert is_current(empty_url)
    downgrade(empty_url, "base")
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        functions = connection.execute(
            text("select proname from pg_proc where pronamespace = 'public'::regnamespace")
        ).all()
    assert inspect(engine).get_table_names() == ["alembic_version"]
    assert functions == []
    engine.dispose()
    upgrade(empty_url)
    assert drift(empty_url) == []


def test_two_migrations_at_once_both_end_well(empty_url):
    code = "import sys; from core.db.migrate import upgrade; upgrade(sys.argv[1])"
    both = [subprocess.Popen([sys.executable, "-c", code, empty_url]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert is_current(empty_url)


def test_a_migration_gives_up_on_a_lock_instead_of_queueing_everybody(database_url):
    plain = database_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(plain) as holder:
        holder.execute("lock table jobs in access share mode")
        with pytest.raises(OperationalError, match="lock timeout"):
            downgrade(database_url, "base")
        holder.rollback()
    assert is_current(database_url)
