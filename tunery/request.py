"""The body of `POST /v1/fine_tuning/jobs`, and of a job file of the command line.

OpenAI's fields keep their names and meaning; ours live under `ext` and inside `method.<type>`.
Keys that we do not know are refused by path inside `method` and `ext`, and noted elsewhere, so that
newer clients of OpenAI's keep working.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Auto = Literal["auto"]
Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ComputeRequest(_Strict):
    gpus: int = Field(
        1, ge=1, le=64, description="Devices per node; processes where there is no GPU."
    )
    nodes: int = Field(1, ge=1, le=64, description="Hosts that train the job together.")
    strategy: Literal[
        "auto",
        "single",
        "ddp",
        "fsdp",
        "deepspeed_zero0",
        "deepspeed_zero1",
        "deepspeed_zero2",
        "deepspeed_zero3",
    ] = Field(
        "auto",
        description="How ranks cooperate; auto: ddp where the model fits each device, else fsdp.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What waits in the host's memory: less of the device's, and slower. fsdp and "
        "deepspeed_zero3 offload parameters, deepspeed_zero2 and deepspeed_zero3 the optimizer.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="Of the forward pass.")
    gradient_checkpointing: bool | Auto = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, more work; auto: "
        "only where the device's memory demands it.",
    )
    micro_batch_tokens: Annotated[int, Field(ge=8, le=2**31 - 1)] | Auto = Field(
        "auto", description="Tokens that one rank holds at once; memory, not mathematics."
    )


class EvaluationRequest(_Strict):
    every_steps: int | None = Field(None, ge=1, description="Optimizer steps between evaluations.")
    metrics: tuple[str, ...] | None = Field(None, description="Names of the task's metrics.")
    test_file: str | None = Field(
        None, min_length=1, description="Measured once, after the last step, as test_<metric>."
    )
    baseline: bool = Field(
        False, description="Measure the untuned base too, before the first step, as base_<metric>."
    )
    predictions: bool = Field(
        True, description="Leave the answers to held-out rows under predictions/ in the result."
    )


class CheckpointsRequest(_Strict):
    every_steps: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="Optimizer steps between checkpoints."
    )
    keep: int = Field(3, ge=1, le=100, description="Resume checkpoints kept.")


class LimitsRequest(_Strict):
    max_runtime_s: int | None = Field(
        None, ge=1, le=366 * 86400, description="Seconds of training, all attempts."
    )


class InitFromRequest(_Strict):
    checkpoint: str = Field(description="Id of a checkpoint, or a fine-tuned model's name.")
    optimizer: bool = Field(False, description="Whether the optimizer's state comes along.")


class OutputRequest(_Strict):
    merge: bool = Field(
        False, description="Also leave base and adapter as one model, under merged/ in the result."
    )


class ExtRequest(_Strict):
    """All that Tunery adds at top level."""

    task: str | dict[str, Any] | None = Field(
        None,
        description="A task's name, or {type, ...settings}; by default what the data asks for.",
    )
    transforms: tuple[dict[str, Any], ...] | None = None
    evaluation: EvaluationRequest = EvaluationRequest()
    compute: ComputeRequest = ComputeRequest()
    checkpoints: CheckpointsRequest = CheckpointsRequest()
    limits: LimitsRequest = LimitsRequest()
    output: OutputRequest = OutputRequest()
    init_from: InitFromRequest | None = None
    attempts: int = Field(3, ge=1, le=20, description="Attempts before an error is final.")
    priority: int = Field(0, ge=-100, le=100, description="Larger goes first.")
    queue: str = Field("default", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    start: Literal["auto", "manual"] = Field(
        "auto", description='"manual" validates and waits for resume.'
    )


class MethodRequest(_Strict):
    """`method`, taken apart: what stood under `method.<type>`."""

    type: str = "supervised"
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    adapter: dict[str, Any] = Field(default_factory=dict)


class JobRequest(_Strict):
    """A create request whose shape is right; `tunery.resolve` asks whether it makes sense."""

    model: str = Field(min_length=1, max_length=512)
    training_file: str = Field(min_length=1)
    validation_file: str | None = None
    method: MethodRequest = MethodRequest()
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=2147483647)
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None
    ext: ExtRequest = ExtRequest()
    ignored: tuple[str, ...] = Field((), description="Top-level keys that mean nothing to us.")


_OPENAI_KEYS = frozenset(JobRequest.model_fields) - {"ignored"} | {"hyperparameters"}
_METHOD_KEYS = ("hyperparameters", "adapter")


def parse_request(body: Any) -> JobRequest:
    """Check the shape of a create request.

    Raises:
        InvalidConfig: with `param`, one entry of `problems` per finding, and the nearest known key.
    """
    if not isinstance(body, dict):
        raise InvalidConfig("the body must be a JSON object")
    fields = {key: body[key] for key in _OPENAI_KEYS if body.get(key) is not None}
    legacy = _mapping(fields.pop("hyperparameters", {}), "hyperparameters")
    fields["method"] = _method(fields.get("method"), legacy)
    fields["ignored"] = tuple(sorted(set(body) - _OPENAI_KEYS))
    check_metadata(fields.get("metadata"))
    return validated(JobRequest, fields)


def _method(method: Any, legacy: Mapping[str, Any]) -> dict[str, Any]:
    if method is None:
        return {"hyperparameters": dict(legacy)}
    method = _mapping(method, "method")
    kind = method.get("type")
    if not isinstance(kind, str):
        raise InvalidConfig(
            "method.type: a method's name is required",
            code="missing_parameter",
            param="method.type",
        )
    _refuse_unknown(set(method) - {"type"}, [kind], "method")
    settings = _mapping(method.get(kind) or {}, f"method.{kind}")
    _refuse_unknown(settings, _METHOD_KEYS, f"method.{kind}")
    given = {key: settings[key] for key in _METHOD_KEYS if settings.get(key) is not None}
    for key, value in given.items():
        _mapping(value, f"method.{kind}.{key}")
    return {
        "type": kind,
        **given,
        "hyperparameters": {**legacy, **given.get("hyperparameters", {})},
    }


def _mapping(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidConfig(f"{param}: an object is expected", param=param)
    return value


def _refuse_unknown(keys: Any, known: Sequence[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise unknown_key(f"{where}.{key}", key, known)


def check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    for key, value in _mapping(metadata, "metadata").items():
        if len(key) > 64 or not isinstance(value, str) or len(value) > 512:
            raise InvalidConfig(
                "metadata: at most 16 pairs, keys of 64 and string values of 512 characters",
                param=f"metadata.{key[:64]}",
            )
    if len(metadata) > 16:
        raise InvalidConfig(f"metadata: {len(metadata)} pairs, at most 16", param="metadata")


def unknown_key(param: str, key: str, known: Sequence[str]) -> InvalidConfig:
    """The error for a key that nobody reads."""
    near = difflib.get_close_matches(key, known, n=1)
    return InvalidConfig(
        f"{param}: unknown parameter",
        code="unknown_parameter",
        hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}",
        param=param,
    )


def validated(model: type[Model], values: Any, prefix: str = "") -> Model:
    """`model(**values)`, its findings put in our words.

    Raises:
        InvalidConfig: names every field at fault by its path in the request; the first is `param`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_problem(model, found, prefix) for found in error.errors(include_input=False)]
        first = problems[0]
        raise InvalidConfig(
            f"{first['path']}: {first['message']}",
            code=first["code"],
            hint=first.get("hint"),
            param=first["path"],
            problems=problems,
        ) from None


_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter"}


def _problem(model: type[BaseModel], found: Any, prefix: str) -> dict[str, Any]:
    loc = tuple(part for part in found["loc"] if not _is_union_tag(part))
    path = ".".join([*([prefix] if prefix else []), *map(str, loc)])
    code = _CODES.get(found["type"], "invalid_value")
    if code == "unknown_parameter":
        unknown = unknown_key(path, str(loc[-1]), _fields_at(model, loc[:-1]))
        return {"code": code, "path": path, "message": "unknown parameter", "hint": unknown.hint}
    return {"code": code, "path": path, "message": found["msg"][:1].lower() + found["msg"][1:]}


def _is_union_tag(part: Any) -> bool:
    """Pydantic names the arm of a union in the path; the request has no such level."""
    return isinstance(part, str) and (
        part in _UNION_ARMS or part.startswith(("literal[", "tuple["))
    )


_UNION_ARMS = frozenset(
    {
        "int",
        "float",
        "str",
        "bool",
        "dict[str,any]",
        "list[str]",
        "constrained-str",
        "constrained-int",
    }
)


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = (
            [
                arm
                for arm in (field.annotation, *get_args(field.annotation))
                if isinstance(arm, type) and issubclass(arm, BaseModel)
            ]
            if field
            else []
        )
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)
