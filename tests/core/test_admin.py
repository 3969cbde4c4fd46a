"""`python -m core.admin`, as an operator and the command line call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from core.db.engine import Database


class Admin:
    def __init__(self, database_url: str) -> None:
        self.environment = {**os.environ, "TUNERY_DATABASE_URL": database_url}

    def __call__(self, *words: str, code: int = 0) -> tuple[list[dict[str, Any]], str]:
        ran = subprocess.run(
            [sys.executable, "-m", "core.admin", *words],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == code, ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr


@pytest.fixture
def admin(database_url: str) -> Admin:
    return Admin(database_url)


async def test_the_life_of_a_key(admin: Admin, db: Database) -> None:
    from core.projects.keys import KeyRing
    from tunery.errors import Unauthenticated

    (made,), _ = admin("keys", "create", "--project", "lab", "--scope", "jobs:read", "--days", "1")
    caller = await KeyRing(db).authenticate(made["key"])
    assert (caller.project, caller.project_name) == (made["project"], "lab")
    assert caller.scopes == {"jobs:read"}
    assert not caller.may("jobs:write")
    listed, _ = admin("keys", "list", "--project", "lab")
    assert [row["id"] for row in listed] == [made["id"]]
    assert "key" not in listed[0]
    admin("keys", "revoke", made["id"])
    admin("keys", "revoke", made["id"])  # once more changes nothing
    with pytest.raises(Unauthenticated):
        await KeyRing(db).authenticate(made["key"])


def test_projects_and_refusals(admin: Admin) -> None:
    (made,), _ = admin("projects", "create", "lab", "--weight", "2")
    assert made["name"] == "lab"
    assert admin("projects", "create", "lab", code=2)[1].startswith("error: there is a project")
    assert "not a project name" in admin("projects", "create", "a:b", code=2)[1]
    assert "no key" in admin("keys", "revoke", "key_none", code=2)[1]
    assert "no project" in admin("keys", "list", "--project", "none", code=2)[1]
    assert admin("projects", "list")[0] == [made]
