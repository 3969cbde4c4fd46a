"""What can be asked for: the shelves of the training library, and the base models."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from api.deps import JobsRead, Parts
from tunery import catalogue
from tunery.errors import InvalidConfig, NotFound

router = APIRouter(prefix="/v1/fine_tuning", tags=["catalogue"])


@cache
def _shelf(name: str) -> list[dict[str, Any]]:
    """Every entry of a shelf. Entries do not change while a process lives.

    Raises:
        NotFound: no such shelf.
    """
    for shelf in catalogue.SHELVES:
        if shelf == name:
            return [catalogue.describe(shelf, entry) for entry in catalogue.entries(shelf)]
    raise NotFound(
        f"there is no shelf {name[:100]!r}",
        code="shelf_not_found",
        hint=f"known: {', '.join(catalogue.SHELVES)}",
    )


@router.get("/catalogue")
async def whole_catalogue(caller: JobsRead) -> Response:
    """Every entry of every shelf: adapters, methods, tasks, transforms."""
    entries = [entry for shelf in catalogue.SHELVES for entry in _shelf(shelf)]
    return JSONResponse({"object": "list", "data": entries, "has_more": False})


@router.get("/catalogue/{shelf}")
async def one_shelf(caller: JobsRead, shelf: str) -> Response:
    """The entries of one shelf."""
    return JSONResponse({"object": "list", "data": _shelf(shelf), "has_more": False})


@router.get("/catalogue/{shelf}/{name}")
async def one_entry(caller: JobsRead, shelf: str, name: str) -> Response:
    """One entry: JSON Schema, what it works with, an example that works as printed."""
    entries = {entry["name"]: entry for entry in _shelf(shelf)}
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        raise NotFound(
            f"there is no entry {name[:100]!r} among the {shelf}",
            code="entry_not_found",
            hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(entries)}",
        )
    return JSONResponse(entries[name])


@router.get("/base_models")
async def base_models(caller: JobsRead, parts: Parts) -> Response:
    """The base models on this machine."""
    found = await run_in_threadpool(parts.models.list)
    shown = [{"object": "base_model", **info.as_json()} for info in found]
    return JSONResponse({"object": "list", "data": shown, "has_more": False})


@router.get("/base_models/{name:path}")
async def base_model(caller: JobsRead, parts: Parts, name: str) -> Response:
    """One base model."""
    try:
        info = await run_in_threadpool(parts.submitter.models.find, name)
    except InvalidConfig as error:
        raise NotFound(error.message, code=error.code, hint=error.hint) from None
    if info is None:
        raise NotFound(
            f"base model {name[:200]!r} is not on this machine yet",
            code="model_not_found",
            hint="the first job that names it brings it from the hub",
        )
    return JSONResponse({"object": "base_model", **info.as_json()})
