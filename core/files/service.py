"""Creating and deleting data files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.db.files import FileRepository, Found, begin_create, end_create
from core.ids import FILE, new_id
from tunery.data.read import suffix_of
from tunery.errors import Gone, InvalidConfig, NotFound, UnsupportedMediaType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncSession

    from core.artifacts.stores import ArtifactStore
    from core.db.engine import Database
    from core.db.idempotency import Attempt
    from core.db.tables import FileRow
    from core.files.intake import Received

FINE_TUNE = "fine-tune"
PURPOSES = ("assistants", "batch", FINE_TUNE, "vision", "user_data", "evals")
EXPIRES_S = (3600, 2_592_000)
"""Shortest and longest life that a file may be given."""
NAME_LIMIT = 255

CONTENT_TYPES = {
    ".jsonl": "application/jsonl",
    ".jsonl.gz": "application/gzip",
    ".csv": "text/csv",
    ".parquet": "application/vnd.apache.parquet",
}
OTHER_CONTENT = "application/octet-stream"
"""Whatever an uploader says a file is: a browser must not run it."""

AttemptOf = Callable[[Any], "Attempt"]
"""From the canonical body of a create to the try that it is."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a file is said to be."""

    filename: str
    purpose: str
    expires_after_s: int | None = None

    def __post_init__(self) -> None:
        """Raises: UnsupportedMediaType: a training file that nothing here reads."""
        if self.purpose == FINE_TUNE and suffix_of(self.filename) is None:
            known = ", ".join(CONTENT_TYPES)
            raise UnsupportedMediaType(
                "training files are named by what they are",
                hint=f"name it {known}",
                param="filename",
            )

    @property
    def suffix(self) -> str | None:
        """How it is validated; None: it is not."""
        return suffix_of(self.filename) if self.purpose == FINE_TUNE else None


def checked_purpose(purpose: Any) -> str:
    """Raises: InvalidConfig: none that is accepted."""
    if purpose not in PURPOSES:
        raise InvalidConfig(
            "purpose: this is none that is accepted",
            code="missing_parameter" if purpose is None else "invalid_purpose",
            hint=f"known: {', '.join(PURPOSES)}",
            param="purpose",
        )
    return str(purpose)


def checked_expiry(given: Mapping[str, Any] | None) -> int | None:
    """Seconds that a file lives, from `{anchor, seconds}`.

    Raises:
        InvalidConfig: another anchor, or too short or too long.
    """
    if not given:
        return None
    if given.get("anchor") != "created_at":
        raise InvalidConfig(
            "expires_after.anchor: created_at is expected", param="expires_after.anchor"
        )
    seconds = str(given.get("seconds", ""))
    least, most = EXPIRES_S
    if not re.fullmatch(r"[0-9]{1,9}", seconds) or not least <= int(seconds) <= most:
        raise InvalidConfig(
            f"expires_after.seconds: {least} to {most} are expected",
            param="expires_after.seconds",
        )
    return int(seconds)


def clean_name(filename: str) -> str:
    """A name that can be stored and shown: the last part of a path, without control characters."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    name = re.sub(r"[\x00-\x1f\x7f]", "", name).encode(errors="replace").decode()
    if len(name) > NAME_LIMIT:
        suffix = suffix_of(name) or ""
        name = name[: NAME_LIMIT - len(suffix)] + suffix
    return name or "file"


def no_file(public_id: str) -> NotFound:
    return NotFound(f"no file {public_id}", code="file_not_found")


@dataclass(frozen=True, slots=True)
class Files:
    """Files of one project."""

    db: Database
    store: ArtifactStore
    project_id: int

    def new_key(self) -> tuple[str, str]:
        """A public id, and where the bytes of that file lie."""
        public_id = new_id(FILE)
        return public_id, f"files/{self.project_id}/{public_id}"

    async def create(
        self, public_id: str, received: Received, described: Description, attempt_of: AttemptOf
    ) -> tuple[FileRow, bool]:
        """The file, and whether an earlier try of the same request made it.

        Raises:
            Conflict, Mismatch: see `core.db.idempotency`.
            Gone: an earlier try made it, and it was deleted since.
        """
        attempt = attempt_of(
            {
                "sha256": received.sha256,
                "purpose": described.purpose,
                "filename": described.filename,
                "expires_after_s": described.expires_after_s,
            }
        )
        async with self.db.begin() as session:
            earlier = await begin_create(session, attempt)
            if earlier is not None:
                return await self._earlier(session, earlier), True
            row = await self.insert(session, public_id, received, described)
            await end_create(session, attempt, public_id)
        received.keep()
        return row, False

    async def insert(
        self, session: AsyncSession, public_id: str, received: Received, described: Description
    ) -> FileRow:
        """The row of what was received; the caller commits, and then keeps the bytes."""
        report = received.report if described.suffix else None
        failed = report is not None and not report.valid
        return await FileRepository(session, self.project_id).insert(
            public_id=public_id,
            filename=described.filename,
            purpose=described.purpose,
            status="error" if failed else "processed",
            status_details=_details(report.as_json()) if failed and report else None,
            size_bytes=received.size_bytes,
            sha256=received.sha256,
            store_key=received.key,
            content_type=CONTENT_TYPES.get(suffix_of(described.filename) or "", OTHER_CONTENT),
            suffix=described.suffix or "",
            format=report.format if report else None,
            rows=report.rows if report else None,
            labels=report.labels if report else None,
            validation=report.as_json() if report else None,
            expires_after_s=described.expires_after_s,
        )

    async def _earlier(self, session: AsyncSession, public_id: str) -> FileRow:
        found = await FileRepository(session, self.project_id).get(public_id)
        if found is None or found.expired:
            raise Gone(f"{public_id} was made by this request before, and deleted since")
        return found.row

    async def get(self, public_id: str) -> FileRow:
        """A file whose time is not over.

        Raises:
            NotFound: there is none.
            Gone: it expired.
        """
        async with self.db.session() as session:
            found = await FileRepository(session, self.project_id).get(public_id)
        return _living(found, public_id)

    async def delete(self, public_id: str) -> None:
        """Remove a file and its bytes.

        Raises:
            NotFound: there is none.
            Conflict: a job that is not over uses it.
        """
        async with self.db.begin() as session:
            key = await FileRepository(session, self.project_id).delete(public_id)
        if key is None:
            raise no_file(public_id)
        await self.store.delete(key)


def _living(found: Found | None, public_id: str) -> FileRow:
    if found is None:
        raise no_file(public_id)
    if found.expired:
        raise Gone(f"{public_id} has expired")
    return found.row


def _details(report: dict[str, Any]) -> str:
    """The first error in a sentence, and how many problems there are."""
    first = next(problem for problem in report["problems"] if problem["severity"] == "error")
    where = "" if first["line"] is None else f"line {first['line']}: "
    found = sum(report["problem_counts"].values())
    more = "" if found == 1 else f" ({found} findings in all)"
    return f"{where}{first['code']}: {first['message']}{more}"
