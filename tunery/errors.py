"""Every error that Tunery raises on purpose, sorted by who can fix it.

    AppError
    ├── UserError         the caller can fix it; never retried
    │   ├── InvalidConfig, InvalidData, NotFound, Conflict, Unsupported, PermissionDenied, ...
    ├── ResourceError     more memory, or a smaller job, fixes it
    │   └── OutOfMemory
    └── TransientError    time fixes it; retried with backoff
        └── StoreUnavailable, WorkerLost, ServiceUnavailable

No error knows HTTP or exit codes: `api/errors.py` and `tunery/cli` map the classes.
A message carries numbers and names, never training text or secrets.
"""

from __future__ import annotations

from typing import Any, ClassVar


class Problem(dict[str, Any]):
    """One finding among several: `{code, message, path?, line?, severity?}`."""


class AppError(Exception):
    """Base of all.

    Attributes:
        code: stable, snake_case, part of the public contract.
        hint: what to do next, naming the setting to change; None when nothing can be said.
        param: dotted path of the request field at fault, for instance `method.dpo.beta`.
        problems: the single findings when there are several.
    """

    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        code: str | None = None,
        hint: str | None = None,
        param: str | None = None,
        problems: list[dict[str, Any]] | None = None,
    ) -> None:
        # All arguments reach `args`, so that pickling across processes brings everything back.
        super().__init__(message, code, hint, param, problems)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.param = param
        self.problems = problems or []

    def __str__(self) -> str:
        return self.message


class UserError(AppError):
    """The caller can fix it; never retried."""

    default_code = "invalid_request"


class InvalidConfig(UserError):
    """A value, key or file reference in a request is wrong."""

    default_code = "invalid_value"


class UnsupportedCombination(UserError):
    """Each part is legal, together they cannot work."""

    default_code = "unsupported_combination"


class InvalidData(UserError):
    """A data file cannot be trained on."""

    default_code = "invalid_training_file"


class NotFound(UserError):
    """The thing does not exist, or is another project's."""

    default_code = "not_found"


class Conflict(UserError):
    """The thing's present state forbids this."""

    default_code = "invalid_job_state"


class Mismatch(UserError):
    """A repeated request, or its precondition, does not say what the first one said."""

    default_code = "idempotency_key_reused"


class Gone(UserError):
    """It existed and has expired."""

    default_code = "file_expired"


class TooLarge(UserError):
    """More bytes than are accepted."""

    default_code = "file_too_large"


class RangeNotSatisfiable(UserError):
    """The asked bytes lie outside the file."""

    default_code = "range_not_satisfiable"


class UnsupportedMediaType(UserError):
    """A kind of file that is not accepted."""

    default_code = "unsupported_media_type"


class Unauthenticated(UserError):
    """No key, or not one of ours."""

    default_code = "invalid_api_key"


class PermissionDenied(UserError):
    """The key is good, its scopes do not reach this far."""

    default_code = "insufficient_scope"


class QuotaExceeded(UserError):
    """A limit of the project is used up; waiting does not help."""

    default_code = "quota_exceeded"


class NotSupported(UserError):
    """Part of the contract that this service does not offer."""

    default_code = "not_supported"


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite."""

    default_code = "non_finite_loss"


class BaseModelUnavailable(UserError):
    """The base model is not on this machine and cannot be fetched."""

    default_code = "base_model_unavailable"


class ResourceError(AppError):
    """More memory, or a smaller job, fixes it."""

    default_code = "resource_exhausted"


class OutOfMemory(ResourceError):
    """The smallest micro-batch does not fit the device."""

    default_code = "out_of_memory"


class TransientError(AppError):
    """Time fixes it; retried with backoff."""

    default_code = "service_unavailable"
    retryable = True


class ServiceUnavailable(TransientError):
    """Postgres, the broker or another part is away."""


class StoreUnavailable(TransientError):
    """The artifact store does not answer."""

    default_code = "artifact_store_error"


class WorkerLost(TransientError):
    """The lease lapsed, or the trainer died without a word."""

    default_code = "worker_lost"


class CheckpointCorrupt(AppError):
    """A checkpoint's bytes do not match its manifest."""

    default_code = "checkpoint_corrupt"
