"""Whether a worker of this host is heard of: `python -m worker.health`, for container checks.

Asks the record, not the broker: a broker that is away must not get healthy training killed.
Exit codes: 0 heard of lately, 1 not.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING

from core.db import workers
from core.db.engine import Database
from core.settings import settings
from tunery.errors import ServiceUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.db.workers import WorkerView


def heard_of(found: Sequence[WorkerView], host: str) -> list[str]:
    """Names of the workers of `host` that are not lost."""
    return [view.row.name for view in found if view.row.host == host and view.status != "lost"]


async def names(db: Database, host: str) -> list[str]:
    async with db.session() as session:
        return heard_of(await workers.list_workers(session), host)


async def check(database_url: str, host: str) -> int:
    """Print what is known of the workers of `host`; the exit code."""
    db = Database(database_url, pool_size=1)
    try:
        found = await names(db, host)
    except ServiceUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        await db.close()
    sys.stdout.write(f"{', '.join(found) or f'no worker of {host} is heard of'}\n")
    return 0 if found else 1


if __name__ == "__main__":
    url = settings().database_url.get_secret_value()
    sys.exit(asyncio.run(check(url, socket.gethostname())))
