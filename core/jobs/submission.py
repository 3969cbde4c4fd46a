"""From a create request to a queued job: checked, resolved and stored in one transaction.

Checks come in this order, and the first that fails answers: schema, references, state, capability,
quota. (Who may ask at all was decided before.) The job, its first event and its outbox row are
committed together, so a job that was answered for is a job that will run.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.db import idempotency, submissions, views
from core.db.engine import driver_of
from core.ids import JOB, new_id
from core.jobs import inspection
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
    from contextlib import AbstractAsyncContextManager

    from core.db.engine import AsyncSession, Database, Driver
    from core.db.idempotency import Attempt
    from core.db.views import JobView
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
        await self.fleet.refresh(self.db)
        if attempt.first() and not _continues(request):
            made = await self._first(caller, body, request, attempt)
        else:
            made = await self._try(caller, body, request, attempt, exactly=False)
        if made is None:
            made = await self._try(caller, body, request, attempt, exactly=True)
        assert made is not None, "an exact count decides"
        return made

    async def _first(
        self, caller: Principal, body: dict[str, Any], request: JobRequest, attempt: Attempt
    ) -> tuple[dict[str, Any], bool] | None:
        """The common case, which has nothing to look up but files: a select and an insert.

        None: the quota is too near to be judged from a glance.
        """
        async with self.db.direct() as driver:
            # A retry of this waits until it is over.
            plan = await self._plan(driver, caller, request, request, attempt.lock)
            if not self._has_room(caller, plan, exactly=False):
                return None
            view = await self._insert(driver, caller, body, plan, attempt)
        return job_object(view, caller.project), False

    async def _try(
        self,
        caller: Principal,
        body: dict[str, Any],
        request: JobRequest,
        attempt: Attempt,
        *,
        exactly: bool,
    ) -> tuple[dict[str, Any], bool] | None:
        """Any case, in one transaction. None: as for `_first`, unless `exactly`.

        Counting exactly begins with the project's lock and ends with the transaction. It cannot be
        taken later: two who share it and both want it alone would wait for each other.
        """
        async with self._turn(caller, exactly), self.db.begin() as session:
            driver = await driver_of(session)
            if exactly:
                await submissions.lock_quota(driver, caller.project_id)
            told = await idempotency.answered(session, attempt)
            if told is not None:
                return await self._told_again(session, caller, attempt, told), True
            lock = attempt.lock if attempt.first() else None
            effective = await self._warm_start(session, caller, request)
            plan = await self._plan(driver, caller, request, effective, lock)
            if not self._has_room(caller, plan, exactly=exactly):
                return None
            view = await self._insert(driver, caller, body, plan, attempt)
            shown = job_object(view, caller.project)
            if attempt.key is not None:
                await idempotency.remember(session, attempt, shown)
        return shown, False

    def _turn(self, caller: Principal, exactly: bool) -> AbstractAsyncContextManager[None]:
        """They would queue in Postgres anyway; here they do so without a connection each."""
        if not exactly:
            return nullcontext()
        return self._counting.setdefault(caller.project_id, asyncio.Lock())

    async def rehearse(self, caller: Principal, body: Any) -> dict[str, Any]:
        """What `submit` would say, with nothing stored.

        Returns `{valid, resolved, problems, warnings, estimate, preflight}`; an invalid request is
        an answer, not an error. `preflight` is what a worker found in the files with the base
        model's tokenizer; None where none could be asked.
        """
        try:
            request = parse_request(body)
            await self.fleet.refresh(self.db)
            async with self.db.begin() as session:
                effective = await self._warm_start(session, caller, request)
                plan = await self._plan(await driver_of(session), caller, request, effective)
                self._has_room(caller, plan, exactly=True)
        except AppError as error:
            if error.retryable:
                raise
            return _rehearsal(problems=error.problems or [_problem(error)])
        found = plan.resolved
        looked = await self._inspect(caller, request, plan)
        return _rehearsal(
            resolved=_stored(found.as_json(), found),
            problems=looked["problems"],
            warnings=[*found.warnings, *_ignored(request), *looked["warnings"]],
            estimate=found.estimate,
            preflight=looked["preflight"],
        )

    async def _inspect(self, caller: Principal, request: JobRequest, plan: _Plan) -> dict[str, Any]:
        """What a worker says of the files; see `core.jobs.inspection`."""
        queue = request.ext.queue
        if self.fleet.devices(queue) is None or not self.settings.dry_run_wait_s:
            return inspection.nobody()
        return await inspection.inspect(
            self.db,
            wait_s=self.settings.dry_run_wait_s,
            project_id=caller.project_id,
            queue=queue,
            spec=plan.resolved.spec.model_dump(mode="json"),
            training_file_id=plan.training.id,
            validation_file_id=None if plan.validation is None else plan.validation.id,
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
        driver: Driver,
        caller: Principal,
        asked: JobRequest,
        request: JobRequest,
        lock: int | None = None,
    ) -> _Plan:
        """What `asked` comes to; `request` is it with an earlier export's settings filled in."""
        named = [name for name in (request.training_file, request.validation_file) if name]
        found = await submissions.references(driver, caller.project_id, named, lock)
        training, validation = _usable_files(found, request)
        info = self.models.find(request.model)
        queue = request.ext.queue
        resolved = resolve(
            request,
            training=_data_file(training),
            validation=None if validation is None else _data_file(validation),
            shape=None if info is None else info.shape,
            revision=None if info is None else info.revision,
            seed=secrets.randbelow(2**31),
            devices=self.fleet.devices(queue),
        )
        queues = [name.strip() for name in self.settings.queues.split(",")]
        self.fleet.check(resolved.spec.compute, queue, queues)
        return _Plan(asked, resolved, training, validation, found.open_jobs, found.counted_freely)

    async def _warm_start(
        self, session: AsyncSession, caller: Principal, request: JobRequest
    ) -> JobRequest:
        """Where an earlier export is named, as `model` or to start from: its base and adapter."""
        if not _continues(request):
            return request
        start = request.ext.init_from
        as_model = request.model.startswith(PREFIX)
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
        if start is not None and start.optimizer and not source.resumable:
            raise Gone(
                f"{name}: its optimizer's state is not kept any more",
                hint="leave ext.init_from.optimizer out to start from its weights alone",
                param="ext.init_from.optimizer",
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
        driver: Driver,
        caller: Principal,
        body: dict[str, Any],
        plan: _Plan,
        attempt: Attempt,
    ) -> JobView:
        request, resolved = plan.request, plan.resolved
        spec = resolved.spec
        public_id = new_id(JOB)
        name = model_name(spec.model.name, caller.project_name, request.suffix, public_id)
        told = resolved.as_json()
        view = await submissions.insert_job(
            driver,
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
            spec=told.pop("spec"),
            resolved={**_stored(told, resolved), "fine_tuned_model": name},
            metadata=request.metadata,
            integrations=request.integrations,
            max_errors=request.ext.attempts - 1,
            queue=request.ext.queue,
            gpus=spec.compute.gpus,
            priority=request.ext.priority,
            hold=request.ext.start == "manual",
            total_steps=plan.total_steps,
        )
        if view is None:
            named = [file.public_id for file in (plan.training, plan.validation) if file]
            _usable_files(await submissions.references(driver, caller.project_id, named), request)
            raise AssertionError("a file that is gone does not come back")
        if warnings := [*resolved.warnings, *_ignored(request)]:
            await submissions.warn(driver, view.id, warnings)
        return view


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


def _continues(request: JobRequest) -> bool:
    """Whether it starts from an earlier export."""
    return request.ext.init_from is not None or request.model.startswith(PREFIX)


def _usable_files(
    found: submissions.References, request: JobRequest
) -> tuple[submissions.File, submissions.File | None]:
    """The training and validation file, each fit to be trained on; raises as `_usable` does."""
    training = _usable(found, request.training_file, "training_file")
    held_out = request.validation_file
    return training, _usable(found, held_out, "validation_file") if held_out else None


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


def _stored(told: dict[str, Any], resolved: Resolved) -> dict[str, Any]:
    """`ext.resolved`, of what `Resolved.as_json` tells; the spec has a column of its own."""
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
    preflight: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.dry_run",
        "valid": not problems,
        "resolved": resolved,
        "problems": problems or [],
        "warnings": warnings or [],
        "estimate": estimate,
        "preflight": preflight,
    }
