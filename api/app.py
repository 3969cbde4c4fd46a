"""The front door: `uvicorn --factory api.app:app`.

`create_app` finds the routers of `api.routes` by itself: a new one is a new module.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import pkgutil
import signal
import threading
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI

from api import errors, routes
from api.deps import Bell, Service
from api.edge import Edge
from core import log
from core import settings as settings_module
from core.artifacts.stores import open_store
from core.broker import Broker
from core.db.engine import Database
from core.db.polls import JobPolls
from core.files import expiry
from core.jobs import reconciler
from core.jobs.capability import BaseModels, Fleet
from core.jobs.reading import JobReader
from core.jobs.submission import Submitter
from core.projects.keys import KeyRing
from tunery import __version__, catalogue
from tunery.models import ModelStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import FrameType

    from core.settings import Settings

STOP_PATIENCE_S = 5.0


def app() -> FastAPI:
    """The application of this process's settings."""
    log.configure()
    return create_app(settings_module.settings())


def create_app(settings: Settings) -> FastAPI:
    """An application that is not started yet: its lifespan opens what the settings name."""
    made = FastAPI(
        title="Tunery",
        version=__version__,
        lifespan=_lifespan(settings),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    # Routes are tried in order, and no part of the service is asked as often as its jobs.
    for module in sorted(pkgutil.iter_modules(routes.__path__), key=lambda it: it.name != "jobs"):
        router = importlib.import_module(f"{routes.__name__}.{module.name}").router
        assert isinstance(router, APIRouter)
        made.include_router(router)
    errors.install(made)
    made.add_middleware(Edge, streamed_limit_bytes=settings.max_file_bytes)
    return made


def _lifespan(
    settings: Settings,
) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(made: FastAPI) -> AsyncIterator[None]:
        async with _running(settings) as service:
            made.state.service = service
            yield

    return lifespan


@contextlib.asynccontextmanager
async def _running(settings: Settings) -> AsyncIterator[Service]:
    """Everything a process holds open, and its background tasks."""
    for shelf in catalogue.SHELVES:
        catalogue.entries(shelf)  # found once for each process: not while the first job waits
    db = Database(settings.database_url.get_secret_value())
    polls = JobPolls(settings.database_url.get_secret_value())
    broker = Broker(settings.broker_url.get_secret_value())
    keys = KeyRing(db)
    models = ModelStore(settings.resolved_models_dir(), settings.hub_allowed)
    service = Service(
        settings=settings,
        db=db,
        store=open_store(settings),
        broker=broker,
        keys=keys,
        models=models,
        submitter=Submitter(db, BaseModels(models), Fleet(), settings),
        reader=JobReader(db, polls),
        bell=Bell(),
        stopping=asyncio.Event(),
    )
    _stop_with_signals(service.stopping)
    tasks = [
        asyncio.create_task(
            reconciler.run(db, broker, settings, service.stopping, service.bell.heard),
            name="reconciler",
        ),
        asyncio.create_task(keys.run(service.stopping), name="key-usage"),
        asyncio.create_task(expiry.run(db, service.store, service.stopping), name="expiry"),
    ]
    try:
        yield service
    finally:
        service.stopping.set()
        _, late = await asyncio.wait(tasks, timeout=STOP_PATIENCE_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(broker.close)
        await polls.close()
        await db.close()


def _stop_with_signals(stopping: asyncio.Event) -> None:
    """End event streams when the process is told to stop.

    The server waits for open responses before it ends the lifespan, and a stream that follows a
    job would keep it waiting: so `stopping` is set by the signal itself, before the server's own
    handler. Only the main thread may do this; elsewhere there are no signals to hear.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)

        def stop(number: int, frame: FrameType | None, before: Any = before) -> None:
            loop.call_soon_threadsafe(stopping.set)
            if callable(before):
                before(number, frame)

        if callable(before):
            signal.signal(number, stop)
