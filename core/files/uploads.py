"""Large files in parts, sent in any order and at once, then put together.

Bytes: `uploads/{upload}/{part}` until the upload ends. Parts are known by their hash, so that a
part which is sent twice is one part, and may stand in the file twice.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.db.files import Upload, UploadRepository, begin_create, end_create
from core.files.intake import receive
from core.files.service import Description, Files
from core.ids import PART, UPLOAD, new_id
from tunery.errors import Conflict, Gone, InvalidConfig, NotFound, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Sequence

    from core.artifacts.stores import ArtifactStore
    from core.db.engine import Database
    from core.db.tables import FileRow, UploadPartRow, UploadRow
    from core.files.service import AttemptOf

LIFE_S = 3600.0
PART_LIMIT_BYTES = 64 << 20
PARTS_LIMIT = 10_000


def no_upload(public_id: str) -> NotFound:
    return NotFound(f"no upload {public_id}", code="upload_not_found")


@dataclass(frozen=True, slots=True)
class Checks:
    """What the client says the whole file is, in hex; None: it does not say."""

    md5: str | None = None
    sha256: str | None = None

    def verify(self, md5: str, sha256: str) -> None:
        """Raises: InvalidConfig: the bytes are others (`checksum_mismatch`)."""
        for name, said, is_ in (("md5", self.md5, md5), ("ext.sha256", self.sha256, sha256)):
            if said is not None and said.lower() != is_:
                raise InvalidConfig(
                    f"{name}: the parts, in this order, have another one",
                    code="checksum_mismatch",
                    param=name,
                )


@dataclass(frozen=True, slots=True)
class Uploads:
    """Uploads of one project."""

    db: Database
    store: ArtifactStore
    project_id: int
    max_file_bytes: int

    async def create(
        self,
        described: Description,
        *,
        size_bytes: int,
        mime_type: str,
        attempt: AttemptOf,
        body: Any,
    ) -> tuple[Upload, bool]:
        """A pending upload, and whether an earlier try of the same request made it.

        Raises:
            TooLarge: the file would be larger than is accepted.
            Conflict, Mismatch: see `core.db.idempotency`.
        """
        if size_bytes > self.max_file_bytes:
            raise TooLarge(f"files may have {self.max_file_bytes} bytes", param="bytes")
        tried = attempt(body)
        async with self.db.begin() as session:
            uploads = UploadRepository(session, self.project_id)
            earlier = await begin_create(session, tried)
            if earlier is not None:
                found = await uploads.get(earlier)
                assert found is not None, "uploads keep their rows"
                return found, True
            row = await uploads.insert(
                public_id=new_id(UPLOAD),
                filename=described.filename,
                purpose=described.purpose,
                mime_type=mime_type,
                size_bytes=size_bytes,
                file_expires_after_s=described.expires_after_s,
                expires_in_s=LIFE_S,
            )
            await end_create(session, tried, row.public_id)
        return Upload(row, late=False, file=None), False

    async def pending(self, public_id: str) -> UploadRow:
        """An upload that takes parts.

        Raises:
            NotFound, Gone, Conflict: there is none, it is too late, it ended.
        """
        async with self.db.session() as session:
            found = await UploadRepository(session, self.project_id).get(public_id)
        return _pending(found, public_id)

    async def add_part(self, public_id: str, chunks: AsyncIterable[bytes]) -> UploadPartRow:
        """Take a part; the same bytes again are the same part.

        Raises:
            TooLarge: more than a part may have.
            NotFound, Gone, Conflict: see `pending`.
        """
        await self.pending(public_id)
        part_id = new_id(PART)
        async with receive(
            self.store,
            f"uploads/{public_id}/{part_id}",
            chunks,
            limit_bytes=PART_LIMIT_BYTES,
            limit_code="part_too_large",
        ) as received:
            async with self.db.begin() as session:
                uploads = UploadRepository(session, self.project_id)
                upload = _pending(await uploads.get(public_id, lock=True), public_id)
                row = await uploads.part(upload, received.sha256)
                if row is not None:
                    return row
                row = await uploads.add_part(
                    upload,
                    public_id=part_id,
                    size_bytes=received.size_bytes,
                    sha256=received.sha256,
                    store_key=received.key,
                )
            received.keep()
        return row

    async def complete(self, public_id: str, part_ids: Sequence[str], checks: Checks) -> Upload:
        """Put the parts together, in this order. A completed upload stays as it is.

        Raises:
            InvalidConfig: a part is unknown, the sizes do not add up, or a checksum differs.
            NotFound, Gone, Conflict: see `pending`.
        """
        found = await self._completed(public_id)
        if found is not None:
            return found
        upload, keys = await self._plan(public_id, part_ids)
        described = Description(upload.filename, upload.purpose, upload.file_expires_after_s)
        files = Files(self.db, self.store, self.project_id)
        file_id, key = files.new_key()
        try:
            async with receive(
                self.store,
                key,
                self._joined(keys),
                limit_bytes=self.max_file_bytes,
                suffix=described.suffix,
            ) as received:
                checks.verify(received.md5, received.sha256)
                async with self.db.begin() as session:
                    uploads = UploadRepository(session, self.project_id)
                    locked = await uploads.get(public_id, lock=True)
                    if locked is not None and locked.row.status == "completed":
                        return locked
                    row = _pending(locked, public_id, late_is_fine=True)
                    file: FileRow = await files.insert(session, file_id, received, described)
                    await uploads.close(row, "completed", file)
                received.keep()
        except NotFound:
            # Whoever completed it meanwhile removed the parts that were being read.
            found = await self._completed(public_id)
            if found is None:
                raise
            return found
        await self.store.delete_prefix(f"uploads/{public_id}")
        return Upload(row, late=False, file=file)

    async def cancel(self, public_id: str) -> Upload:
        """Give an upload up. A cancelled one stays cancelled.

        Raises:
            NotFound, Gone, Conflict: see `pending`.
        """
        async with self.db.begin() as session:
            uploads = UploadRepository(session, self.project_id)
            found = await uploads.get(public_id, lock=True)
            if found is not None and found.row.status == "cancelled":
                return found
            row = _pending(found, public_id)
            await uploads.close(row, "cancelled")
        await self.store.delete_prefix(f"uploads/{public_id}")
        return Upload(row, late=False, file=None)

    async def _completed(self, public_id: str) -> Upload | None:
        async with self.db.session() as session:
            found = await UploadRepository(session, self.project_id).get(public_id)
        return found if found is not None and found.row.status == "completed" else None

    async def _plan(self, public_id: str, part_ids: Sequence[str]) -> tuple[UploadRow, list[str]]:
        """The upload, and the keys of its parts in order."""
        async with self.db.session() as session:
            uploads = UploadRepository(session, self.project_id)
            upload = _pending(await uploads.get(public_id), public_id)
            parts = {part.public_id: part for part in await uploads.parts(upload, part_ids)}
        for i, part_id in enumerate(part_ids):
            if part_id not in parts:
                raise InvalidConfig(
                    f"part_ids.{i}: the upload has no such part",
                    code="part_not_found",
                    param=f"part_ids.{i}",
                )
        total = sum(parts[part_id].size_bytes for part_id in part_ids)
        if total != upload.size_bytes:
            raise InvalidConfig(
                f"the parts have {total} bytes, and the upload was announced with "
                f"{upload.size_bytes}",
                code="upload_size_mismatch",
                param="part_ids",
            )
        return upload, [parts[part_id].store_key for part_id in part_ids]

    async def _joined(self, keys: Sequence[str]) -> AsyncIterator[bytes]:
        for key in keys:
            async with aclosing(self.store.get(key)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk


def _pending(found: Upload | None, public_id: str, *, late_is_fine: bool = False) -> UploadRow:
    if found is None:
        raise no_upload(public_id)
    if found.row.status == "expired" or (found.late and not late_is_fine):
        raise Gone(f"{public_id} has expired", code="upload_expired")
    if found.row.status != "pending":
        raise Conflict(f"{public_id} is {found.row.status}", code="invalid_upload_state")
    return found.row
