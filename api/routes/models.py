"""`/v1/models`: base models to start from, and the models that jobs made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from api.deps import JobsRead, JobsWrite, Parts
from core.artifacts.exports import delete_export
from core.db import views
from core.jobs.view import unix
from tunery.errors import NotFound, PermissionDenied

if TYPE_CHECKING:
    from core.db.views import Model
    from core.projects.keys import Principal
    from tunery.models import ModelInfo

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(caller: JobsRead, parts: Parts) -> Response:
    """Base models first, then what the project trained, newest first. One page, as OpenAI's."""
    bases = await run_in_threadpool(parts.models.list)
    async with parts.db.read() as session:
        made = await views.models(session, caller.project_id)
    shown = [_base(info) for info in bases] + [_made(model, caller) for model in made]
    return JSONResponse({"object": "list", "data": shown, "has_more": False})


@router.get("/{name:path}")
async def retrieve(caller: JobsRead, parts: Parts, name: str) -> Response:
    """A base model, a fine-tuned model, or one of its checkpoints, by name."""
    async with parts.db.read() as session:
        made = await views.model(session, caller.project_id, name)
    if made is not None:
        return JSONResponse(_made(made, caller))
    info = parts.submitter.models.get(name)
    if info is None:
        raise _no_model(name)
    return JSONResponse(_base(info))


@router.delete("/{name:path}")
async def delete(caller: JobsWrite, parts: Parts, name: str) -> Response:
    """Delete a model that the project trained: its files go, the job's record stays."""
    async with parts.db.read() as session:
        made = await views.model(session, caller.project_id, name)
    if made is None:
        if parts.submitter.models.get(name) is not None:
            raise PermissionDenied(
                f"{name!r} is a base model of this machine",
                code="base_model_not_deletable",
                hint="its operator removes it with `tunery models remove`",
            )
        raise _no_model(name)
    await delete_export(parts.db, parts.store, made)
    return JSONResponse({"id": name, "object": "model", "deleted": True})


def _no_model(name: str) -> NotFound:
    return NotFound(f"there is no model {name[:300]!r}", code="model_not_found", param="model")


def _base(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": int(info.imported_at),
        "owned_by": "base",
        "ext": {"revision": info.revision, "parameters": info.parameters},
    }


def _made(model: Model, caller: Principal) -> dict[str, Any]:
    adapter = model.spec["adapter"]
    return {
        "id": model.fine_tuned_model if model.final and model.fine_tuned_model else model.name,
        "object": "model",
        "created": unix(model.created_at),
        "owned_by": caller.project_name,
        "ext": {
            "job_id": model.job,
            "checkpoint_id": model.checkpoint,
            "step": model.step,
            "base": model.spec["model"]["name"],
            "revision": model.spec["model"]["revision"],
            "adapter": adapter["type"],
            "lora_rank": adapter["config"].get("r"),
        },
    }
