"""How Alembic reaches the database. Used by `core.db.migrate` and by the `alembic` command."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, text

from core.db.tables import Base
from core.settings import settings

# One migration at a time, whoever starts it; any constant of ours will do.
MIGRATION_LOCK = 7_106_502_231

config = context.config
url = config.attributes.get("database_url") or settings().database_url.get_secret_value()


def run() -> None:
    """Run the migrations in one transaction under an advisory lock."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            connection.execute(text("select pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
            # A migration that waits for a lock makes every later query wait behind it.
            connection.execute(text("set lock_timeout = '3s'"))
            connection.commit()
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                compare_type=True,
                compare_server_default=True,
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()


if context.is_offline_mode():
    context.configure(url=url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    run()
