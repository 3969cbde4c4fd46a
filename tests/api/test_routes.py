"""What holds for every route there is, generated from the router."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.routing import APIRoute

from api.app import create_app
from api.deps import Open, Scoped
from core.projects.keys import SCOPES
from core.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi.dependencies.models import Dependant

    from tests.api.conftest import Service, Worker

OPEN = {"/healthz", "/readyz", "/metrics", "/version"}
ID_OF = {
    "job_id": "job",
    "file_id": "file",
    "upload_id": "upload",
    "which": "checkpoint",
    "name": "model",
}


def routes() -> Iterator[APIRoute]:
    def walk(found: Any) -> Iterator[APIRoute]:
        for route in found:
            if isinstance(route, APIRoute):
                yield route
            elif hasattr(route, "original_router"):
                yield from walk(route.original_router.routes)

    return walk(create_app(Settings()).routes)


def guards(dependant: Dependant) -> list[Any]:
    found = [d.call for d in dependant.dependencies if isinstance(d.call, Scoped | Open)]
    return found + [guard for d in dependant.dependencies for guard in guards(d)]


def calls() -> list[tuple[str, str, APIRoute]]:
    return sorted(
        ((method, route.path, route) for route in routes() for method in route.methods),
        key=lambda call: call[:2],
    )


CALLS = calls()
NAMES = [f"{method} {path}" for method, path, _ in CALLS]


def test_the_router_is_found() -> None:
    assert {"POST /v1/fine_tuning/jobs", "GET /hf/api/models/{project}/{name}"} <= set(NAMES)


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_every_route_declares_one_scope_or_that_it_is_open(call: tuple[str, str, APIRoute]) -> None:
    _, path, route = call
    found = guards(route.dependant)
    assert len(found) == 1, "a route names its scope once"
    assert isinstance(found[0], Open) is (path in OPEN)
    if isinstance(found[0], Scoped):
        assert found[0].scope in SCOPES


def url(path: str, ids: dict[str, str]) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1].split(":")[0]
        return ids[ID_OF[name]] if name in ID_OF else "x"

    return re.sub(r"\{([^}]+)\}", fill, path)


async def test_a_key_without_the_scope_is_refused_everywhere(service: Service) -> None:
    """Route by scope: a key with all other scopes gets 403 before anything is looked up."""
    keys = {
        scope: await service.key(scopes=[s for s in SCOPES if s not in (scope, "admin")])
        for scope in SCOPES
    }
    for method, path, route in CALLS:
        guard = guards(route.dependant)[0]
        if isinstance(guard, Open):
            continue
        http = service.http(keys[guard.scope])
        answer = await http.request(method, url(path, dict.fromkeys(ID_OF.values(), "x")))
        assert answer.status_code == 403, f"{method} {path}"
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "insufficient_scope", f"{method} {path}"


async def test_without_a_key_nothing_but_the_open_routes_answers(service: Service) -> None:
    http = service.http(None)
    for method, path, _ in CALLS:
        answer = await http.request(method, url(path, dict.fromkeys(ID_OF.values(), "x")))
        expected = 200 if path in OPEN else 401
        assert answer.status_code == expected, f"{method} {path}"


async def test_another_projects_ids_are_missing_on_every_route(
    service: Service, key: str, base_model: str, data_file: str, worker: Worker
) -> None:
    """Every route with an id, called with real ids of somebody else, changes and tells nothing."""
    mine = service.openai(key)
    job = await mine.fine_tuning.jobs.create(model=base_model, training_file=data_file)
    claim = await worker.claim()
    saved = await worker.save(claim, 3, valid_loss=1.0)
    ids = {"job": job.id, "file": data_file, "upload": "upload_x", "checkpoint": saved.public_id}
    before = await worker.job(job.id)
    theirs = service.http(await service.key("rival"))
    called = 0
    for method, path, route in CALLS:
        if "{" not in path or not route.include_in_schema:
            continue
        named = ids | {"model": job.id if path.startswith("/hf") else saved.name}
        if "{shelf}" in path or "base_models" in path or "{worker_id}" in path:
            continue  # the same for everybody, or the operator's
        filled = url(path, named).replace("/x/", "/acme/") if "/hf" in path else url(path, named)
        body: Any = {} if method in ("POST", "PATCH") else None
        answer = await theirs.request(method, filled, json=body)
        called += 1
        assert answer.status_code == 404, f"{method} {path}: {answer.status_code} {answer.text}"
    assert called > 20
    after = await worker.job(job.id)
    assert after == before
