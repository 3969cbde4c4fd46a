"""From a create request to a queued job: checked, resolved and stored in one transaction.

Checks come in this order, and the first that fails answers: schema, references, state, capability,
quota. (Who may ask at all was decided before.) The job, its first event and its outbox row are
committed together, so a job that was answered for is a job that will run.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.db import events, idempotency, submissions, views
from core.ids import JOB, new_id
from core.jobs.naming import PREFIX, model_name
from core.jobs.view import job_object
from tunery.errors import (
    AppError,
    Conflict,
    Gone,
    InvalidConfig,
    InvalidData,
    QuotaExceeded,
    UnsupportedCombination,
)
from tunery.request import InitFromRequest, parse_request
from tunery.resolve import Resolved, resolve
from tunery.spec import DataFile

if TYPE_CHECKING:
    from core.db.engine import AsyncSession, Database
    from core.db.idempotency import Attempt
    from core.jobs.capability import BaseModels, Fleet
    from core.projects.keys import Principal
    from core.settings import Settings
    from tunery.request import JobRequest


@dataclass(frozen=True, slots=True)
class Submitter:
    """Creates jobs. One per process."""

    db: Database
    models: BaseModels
    fleet: Fleet
    settings: Settings
    _counting: dict[int, asyncio.Lock] = field(default_factory=dict)

    async def submit(
        self, caller: Principal, body: Any, attempt: Attempt
    ) -> tuple[dict[str, Any], bool]:
        """The job object, and whether it is an earlier request's answer.

        Raises:
            InvalidConfig, InvalidData, Gone: what the request says or refers to is wrong.
            Conflict: a file is still being looked at, or the same key is being answered.
            Mismatch: the idempotency key was used for another body.
            UnsupportedCombination: no worker could run it.
            QuotaExceeded: the project has too many open jobs.
        """
        request = parse_request(body)
        made = await self._try(caller, body, request, attempt, exactly=False)
        if made is None:
            # They would queue in Postgres anyway; here they do so without a connection each.
            async with self._counting.setdefault(caller.project_id, asyncio.Lock()):
                made = await self._try(caller, body, request, attempt, exactly=True)
        assert made is not None, "an exact count decides"
        return made

    async def _try(
        self,
        caller: Principal,
        body: dict[str, Any],
        request: JobRequest,
        attempt: Attempt,
        *,
        exactly: bool,
    ) -> tuple[dict[str, Any], bool] | None:
        """One transaction. None: the quota is too near to be judged from a glance.

        Counting exactly begins with the project's lock and ends with the transaction. It cannot be
        taken later: two who share it and both want it alone would wait for each other.
        """
        async with self.db.begin() as session:
            if exactly:
                await submissions.lock_quota(session, caller.project_id)
            told = await idempotency.answered(session, attempt)
            if told is not None:
                return await self._told_again(session, caller, attempt, told), True
            # A retry of this waits until it is over.
            lock = attempt.lock if attempt.first() else None
            plan = await self._plan(session, caller, request, lock)
            if not self._has_room(caller, plan, exactly=exactly):
                return None
            shown = await self._insert(session, caller, body, plan, attempt)
            if attempt.key is not None:
                await idempotency.remember(session, attempt, shown)
        return shown, False

    async def rehearse(self, caller: Principal, body: Any) -> dict[str, Any]:
        """What `submit` would say, with nothing stored.

        Returns `{valid, resolved, problems, warnings, estimate}`; an invalid request is an answer,
        not an error.
        """
        try:
            request = parse_request(body)
            async with self.db.begin() as session:
                plan = await self._plan(session, caller, request)
                self._has_room(caller, plan, exactly=True)
        except AppError as error:
            if error.retryable:
                raise
            return _rehearsal(problems=error.problems or [_problem(error)])
        found = plan.resolved
        return _rehearsal(
            resolved=_stored(found) | {"spec": found.spec.model_dump(mode="json")},
            warnings=[*found.warnings, *_ignored(request)],
            estimate=found.estimate,
        )

    async def _told_again(
        self, session: AsyncSession, caller: Principal, attempt: Attempt, told: dict[str, Any]
    ) -> dict[str, Any]:
        if attempt.key is not None:
            return told
        view = await views.job(session, caller.project_id, told["id"])
        assert view is not None, "jobs are never deleted"
        return job_object(view, caller.project)

    async def _plan(
        self,
        session: AsyncSession,
        caller: Principal,
        request: JobRequest,
        lock: int | None = None,
    ) -> _Plan:
        named = [name for name in (request.training_file, request.validation_file) if name]
        found = await submissions.references(session, caller.project_id, named, lock)
        training = _usable(found, request.training_file, "training_file")
        validation = (
            _usable(found, request.validation_file, "validation_file")
            if request.validation_file
            else None
        )
        asked, request = request, await self._warm_start(session, caller, request)
        info = self.models.find(request.model)
        queue = request.ext.queue
        resolved = resolve(
            request,
            training=_data_file(training),
            validation=None if validation is None else _data_file(validation),
            shape=None if info is None else info.shape,
            revision=None if info is None else info.revision,
            seed=secrets.randbelow(2**31),
            devices=await self.fleet.devices(session, queue),
        )
        queues = [name.strip() for name in self.settings.queues.split(",")]
        await self.fleet.check(session, resolved.spec.compute, queue, queues)
        return _Plan(asked, resolved, training, validation, found.open_jobs, found.counted_freely)

    async def _warm_start(
        self, session: AsyncSession, caller: Principal, request: JobRequest
    ) -> JobRequest:
        """Where an earlier export is named, as `model` or to start from: its base and adapter."""
        start = request.ext.init_from
        as_model = request.model.startswith(PREFIX)
        if not as_model and start is None:
            return request
        if as_model and start is not None:
            raise InvalidConfig(
                "model names a fine-tuned model and ext.init_from another start: give one of them",
                param="ext.init_from",
            )
        name = request.model if start is None else start.checkpoint
        param = "model" if as_model else "ext.init_from.checkpoint"
        source = await views.model(session, caller.project_id, name)
        if source is None:
            raise InvalidConfig(
                f"{param}: there is no model or checkpoint {name[:200]!r}",
                code="model_not_found",
                param=param,
            )
        base, adapter = source.spec["model"]["name"], source.spec["adapter"]
        if not as_model and request.model != base:
            raise UnsupportedCombination(
                f"the checkpoint was trained on {base!r}, not on {request.model!r}",
                hint=f'set "model" to {base!r}',
                param=param,
            )
        given = request.method.adapter
        if given and given.get("type", "lora") != adapter["type"]:
            raise UnsupportedCombination(
                f"the checkpoint is a {adapter['type']} adapter",
                hint="leave method.<type>.adapter out: the checkpoint's is continued",
                param=f"method.{request.method.type}.adapter.type",
            )
        continued = {"type": adapter["type"], **adapter["config"], **given}
        init = InitFromRequest(
            checkpoint=source.checkpoint, optimizer=start.optimizer if start else False
        )
        return request.model_copy(
            update={
                "model": base,
                "method": request.method.model_copy(update={"adapter": continued}),
                "ext": request.ext.model_copy(update={"init_from": init}),
            }
        )

    def _has_room(self, caller: Principal, plan: _Plan, *, exactly: bool) -> bool:
        """Whether one more job fits. False: perhaps not, count exactly.

        Raises:
            QuotaExceeded: it does not.
        """
        limit = caller.max_queued_jobs or self.settings.max_queued_jobs
        if not exactly and plan.counted_freely and plan.open_jobs + submissions.MARGIN < limit:
            return True
        if exactly and plan.open_jobs < limit:
            return True
        if not exactly:
            return False
        raise QuotaExceeded(
            f"the project has {plan.open_jobs} of {limit} jobs waiting or running",
            hint="wait for one to end, or cancel one",
            param="queued_jobs",
        )

    async def _insert(
        self,
        session: AsyncSession,
        caller: Principal,
        body: dict[str, Any],
        plan: _Plan,
        attempt: Attempt,
    ) -> dict[str, Any]:
        request, spec = plan.request, plan.resolved.spec
        public_id = new_id(JOB)
        name = model_name(spec.model.name, caller.project_name, request.suffix, public_id)
        view = await submissions.insert_job(
            session,
            attempt=attempt if attempt.key is None else None,
            training_file=plan.training.public_id,
            validation_file=None if plan.validation is None else plan.validation.public_id,
            public_id=public_id,
            project_id=caller.project_id,
            model=request.model,
            method=spec.method.type,
            suffix=request.suffix,
            seed=spec.seed,
            training_file_id=plan.training.id,
            validation_file_id=None if plan.validation is None else plan.validation.id,
            request=body,
            spec=spec.model_dump(mode="json"),
            resolved={**_stored(plan.resolved), "fine_tuned_model": name},
            metadata=request.metadata,
            integrations=request.integrations,
            max_errors=request.ext.attempts - 1,
            queue=request.ext.queue,
            gpus=spec.compute.gpus,
            priority=request.ext.priority,
            hold=request.ext.start == "manual",
            total_steps=plan.total_steps,
        )
        for warning in [*plan.resolved.warnings, *_ignored(request)]:
            await events.append(
                session,
                view.id,
                attempt=0,
                kind="warning",
                level="warn",
                message=warning["message"],
                data={"code": warning["code"], "param": warning["path"]},
            )
        return job_object(view, caller.project)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request that can be granted, if there is room."""

    request: JobRequest
    resolved: Resolved
    training: submissions.File
    validation: submissions.File | None
    open_jobs: int
    counted_freely: bool

    @property
    def total_steps(self) -> int:
        return int(self.resolved.estimate["steps"])


def _usable(found: submissions.References, name: str, param: str) -> submissions.File:
    """The file that a request names, fit to be trained on.

    Raises:
        InvalidConfig: not there, or of another purpose.
        Gone: expired.
        Conflict: not looked at yet.
        InvalidData: looked at, and found wrong.
    """
    file = found.files.get(name)
    if file is None:
        raise InvalidConfig(
            f"{param}: there is no file {name[:100]!r}", code="file_not_found", param=param
        )
    if file.purpose != "fine-tune":
        raise InvalidConfig(
            f"{param}: {name} was uploaded for {file.purpose!r}",
            code="invalid_purpose",
            hint='upload it with purpose "fine-tune"',
            param=param,
        )
    if file.expired:
        raise Gone(f"{param}: {name} has expired", param=param)
    if file.status == "uploaded":
        raise Conflict(
            f"{param}: {name} is still being validated", code="validation_pending", param=param
        )
    if file.status != "processed" or file.format is None or not file.rows:
        raise InvalidData(
            f"{param}: {name} cannot be trained on: {file.status_details or 'no usable rows'}",
            code=f"invalid_{param}",
            hint=f"GET /v1/files/{name} tells lines and causes under ext.validation",
            param=param,
        )
    return file


def _data_file(file: submissions.File) -> DataFile:
    return DataFile.model_validate(
        {
            "file_id": file.public_id,
            "sha256": file.sha256,
            "format": file.format,
            "rows": file.rows,
            "size_bytes": file.size_bytes,
            "suffix": file.suffix,
            "labels": file.labels,
        }
    )


def _stored(resolved: Resolved) -> dict[str, Any]:
    """`ext.resolved` but for the spec, which has a column of its own."""
    told = {key: value for key, value in resolved.as_json().items() if key != "spec"}
    return {
        **told,
        "hyperparameters": resolved.hyperparameters,
        "estimate": resolved.estimate,
    }


def _ignored(request: JobRequest) -> list[dict[str, Any]]:
    return [
        {
            "code": "unknown_parameter",
            "path": key,
            "message": f"{key[:100]}: this parameter means nothing here and was ignored",
            "severity": "warning",
        }
        for key in request.ignored
    ]


def _problem(error: AppError) -> dict[str, Any]:
    found = {"code": error.code, "path": error.param, "message": error.message}
    return found | ({"hint": error.hint} if error.hint else {})


def _rehearsal(
    *,
    resolved: dict[str, Any] | None = None,
    problems: list[dict[str, Any]] | None = None,
    warnings: list[dict[str, Any]] | None = None,
    estimate: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.dry_run",
        "valid": not problems,
        "resolved": resolved,
        "problems": problems or [],
        "warnings": warnings or [],
        "estimate": estimate,
    }
