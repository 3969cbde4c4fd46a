"""Parts of OpenAI's contract that are not offered here: said as such, not as a bare 404.

`x-should-retry: false` goes with every 501, because the stock client retries all of 5xx.
"""

from __future__ import annotations

from typing import NoReturn

from fastapi import APIRouter, Request

from api.deps import JobsRead
from tunery.errors import NotSupported

router = APIRouter(include_in_schema=False)

PATHS: dict[str, str] = {
    "/v1/fine_tuning/checkpoints/{name:path}/permissions": "sharing checkpoints between projects",
    "/v1/fine_tuning/checkpoints/{name:path}/permissions/{permission}": "sharing checkpoints",
    "/v1/fine_tuning/alpha/graders/run": "running graders",
    "/v1/fine_tuning/alpha/graders/validate": "validating graders",
    "/v1/webhook_endpoints": "webhooks",
    "/v1/webhook_endpoints/{rest:path}": "webhooks",
    "/v1/webhook_event_types": "webhooks",
    "/v1/chat/completions": "inference",
    "/v1/completions": "inference",
    "/v1/responses": "inference",
    "/v1/embeddings": "inference",
}


def _add(path: str, what: str) -> None:
    async def refuse(caller: JobsRead, request: Request) -> NoReturn:
        raise NotSupported(f"{what}: not offered by this service")

    router.add_api_route(path, refuse, methods=["GET", "POST", "DELETE"], response_model=None)


for _path, _what in PATHS.items():
    _add(_path, _what)
