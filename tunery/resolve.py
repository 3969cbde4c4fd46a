"""From a request to a `TrainingSpec` in which nothing is "auto" any more.

Done once, before a job is queued, by the API and by `tunery train` alike. Every value's origin is
kept, so that `ext.resolved` can say who decided what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tunery import catalogue
from tunery.data import formats
from tunery.data.formats import sorted_labels
from tunery.entries import InCache, Loads, MakesExamples, NeedsModels
from tunery.errors import InvalidConfig, UnsupportedCombination
from tunery.placement import load_of, memory_needed, place
from tunery.request import unknown_key, validated
from tunery.spec import (
    BaseModelRef,
    Checkpoints,
    Compute,
    Data,
    Evaluation,
    InitFrom,
    Limits,
    Output,
    TrainingSpec,
    Use,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunery.catalogue import Shelf
    from tunery.entries import Adapter, EntryConfig, Method, ModelShape, Task
    from tunery.placement import Load
    from tunery.request import JobRequest
    from tunery.spec import DataFile

BYTES_PER_TOKEN = 4.0
"""Of English JSONL under a 32k to 128k BPE vocabulary; code and other scripts are denser."""
AUTO_MAX_LENGTH = 2048


@dataclass(frozen=True)
class DeviceFacts:
    """What the workers that may run the job offer."""

    kind: Literal["cpu", "cuda"] = "cpu"
    memory_bytes: int | None = None
    """Of one device; a CPU's is the host's."""
    bf16: bool = False
    flops_per_s: float = 5e10
    """Sustained, of one device; the default is one CPU core's worth of fp32."""


@dataclass
class Resolved:
    """A spec, and the story of how it came about."""

    spec: TrainingSpec
    sources: dict[str, str]
    warnings: list[dict[str, Any]]
    estimate: dict[str, Any]
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """What OpenAI's job object shows: n_epochs, batch_size, learning_rate_multiplier."""

    def as_json(self) -> dict[str, Any]:
        """`ext.resolved`."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "spec_sha256": self.spec.sha256(),
            "sources": self.sources,
            "warnings": self.warnings,
        }


def resolve(
    request: JobRequest,
    *,
    training: DataFile,
    validation: DataFile | None = None,
    test: DataFile | None = None,
    shape: ModelShape | None = None,
    revision: str | None = None,
    seed: int,
    devices: DeviceFacts | None = None,
) -> Resolved:
    """Fill in what the request left open, and refuse what cannot work.

    Args:
        shape: of the base model; None when it is not on this machine yet, which leaves lengths
            and memory unchecked until the run starts.
        seed: used when the request names none.

    Raises:
        InvalidConfig: a value or key is wrong, by path.
        UnsupportedCombination: legal parts that do not go together; says what would.
    """
    story = _Story()
    method = catalogue.find("methods", request.method.type, "method.type")
    transforms, read_as = _transforms(request, training, story)
    task = _task(request, method, read_as, story)
    adapter = _adapter(request, story)
    _check_fit(request, method, task.entry, adapter.entry, training, validation, read_as)
    _check_test(request, training, test)
    settings = _Settings(request, method, adapter.entry, training, shape)
    config, multiplier = settings.resolve(story)
    load = load_of(adapter.entry, adapter.config, shape, getattr(config, "max_length", 0))
    compute = place(
        request.ext.compute, adapter.entry, load, devices, note=story.note, warn=story.warn
    )
    _check_strategy(request, adapter.entry, compute)
    count = _examples(method, training, getattr(config, "max_length", 0))
    steps = total_steps(config, count)
    spec = TrainingSpec(
        model=BaseModelRef(name=request.model, revision=revision),
        task=task.use,
        method=Use(type=method.name, config=config.model_dump(mode="json")),
        adapter=adapter.use,
        transforms=transforms,
        data=_data(training, validation, test, story),
        seed=request.seed if request.seed is not None else seed,
        compute=compute,
        evaluation=_evaluation(request, task.entry, validation or test, story),
        checkpoints=_checkpoints(request, steps, story),
        limits=Limits(max_runtime_s=request.ext.limits.max_runtime_s),
        output=_output(request, adapter.entry),
        init_from=InitFrom(**request.ext.init_from.model_dump()) if request.ext.init_from else None,
    )
    shown = {
        name: getattr(config, name)
        for name in ("n_epochs", "batch_size", "beta")
        if hasattr(config, name)
    }
    return Resolved(
        spec=spec,
        sources=story.sources,
        warnings=story.warnings,
        estimate=_estimate(spec, config, steps, count, load, devices or DeviceFacts()),
        hyperparameters={**shown, "learning_rate_multiplier": multiplier},
    )


def further_models(spec: TrainingSpec) -> tuple[BaseModelRef, ...]:
    """Base models that a run reads beside the one that it trains."""
    method = catalogue.find("methods", spec.method.type)
    if not isinstance(method, NeedsModels):
        return ()
    return tuple(method.models(method.Config.model_validate(spec.method.config)))


def _examples(method: Method, training: DataFile, max_length: int) -> int:
    """What a step takes `batch_size` of: rows, or what the method makes of them."""
    if isinstance(method, MakesExamples):
        return method.examples(training.size_bytes / BYTES_PER_TOKEN, max_length)
    return training.rows


def total_steps(config: Any, rows: int) -> int:
    """Optimizer steps of a run over `rows` examples; a last, smaller batch counts."""
    if config.max_steps is not None:
        return int(config.max_steps)
    batches = max(1, math.ceil(float(config.n_epochs) * math.ceil(rows / int(config.batch_size))))
    return batches * int(config.steps_per_batch)


class _Story:
    """Who decided what."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self.warnings: list[dict[str, Any]] = []

    def note(self, path: str, source: str) -> None:
        self.sources[path] = source

    def warn(self, code: str, path: str, message: str) -> None:
        self.warnings.append(
            {"code": code, "path": path, "message": message, "severity": "warning"}
        )


def _adapter_path(request: JobRequest, key: str) -> str:
    return f"method.{request.method.type}.adapter.{key}"


class _Choice(NamedTuple):
    """An entry and its settings, checked, and as a spec writes them down."""

    entry: Any
    config: EntryConfig
    use: Use


def _choose(shelf: Shelf, given: Mapping[str, Any], param: str) -> _Choice:
    """Check an entry's settings against its own schema.

    Raises:
        InvalidConfig: no such entry, or a setting of it is wrong.
    """
    kind = given.get("type")
    if not isinstance(kind, str):
        raise InvalidConfig(
            f"{param}.type: the entry's name is required",
            code="missing_parameter",
            param=f"{param}.type",
        )
    entry = catalogue.find(shelf, kind, f"{param}.type")
    values = {key: value for key, value in given.items() if key != "type" and value != "auto"}
    config: EntryConfig = validated(entry.Config, values, param)
    return _Choice(entry, config, Use(type=kind, config=config.model_dump(mode="json")))


def _task(request: JobRequest, method: Method, read_as: str, story: _Story) -> _Choice:
    asked = request.ext.task
    if asked is None:
        kind = formats.find(read_as).task
        if method.tasks is not None and kind not in method.tasks and len(method.tasks) == 1:
            (kind,) = method.tasks
            story.note("task.type", f"auto: {method.name} trains nothing else")
        else:
            story.note("task.type", f"auto: the rows are {read_as} data")
        return _choose("tasks", {"type": kind}, "ext.task")
    story.note("task.type", "request")
    return _choose("tasks", {"type": asked} if isinstance(asked, str) else asked, "ext.task")


def _adapter(request: JobRequest, story: _Story) -> _Choice:
    given = request.method.adapter
    story.note("adapter.type", "request" if "type" in given else "default")
    return _choose("adapters", {"type": "lora", **given}, f"method.{request.method.type}.adapter")


def _check_fit(
    request: JobRequest,
    method: Method,
    task: Task,
    adapter: Adapter,
    training: DataFile,
    validation: DataFile | None,
    read_as: str,
) -> None:
    usable = _trained_on(method) & task.formats
    if read_as not in usable:
        others = sorted(
            name
            for name in catalogue.entries("methods")
            if read_as in _trained_on(catalogue.find("methods", name))
        )
        after = "" if read_as == training.format else f", read as {read_as} data"
        raise UnsupportedCombination(
            f"method {method.name!r} on task {task.name!r} trains on {_listed(usable)} data, and "
            f"{training.file_id} is {training.format} data{after}",
            hint=f"methods that take {read_as} data: {', '.join(others) or 'none'}",
            param="training_file",
        )
    if validation is not None and validation.format != training.format:
        raise UnsupportedCombination(
            f"the training file is {training.format} data and the validation file is "
            f"{validation.format} data",
            hint="both must have one format",
            param="validation_file",
        )
    if method.tasks is not None and task.name not in method.tasks:
        raise UnsupportedCombination(
            f"method {method.name!r} works on {_listed(method.tasks)}, not on {task.name!r}",
            param="ext.task",
        )
    for what, allowed, name in (
        ("task", adapter.tasks, task.name),
        ("method", adapter.methods, method.name),
    ):
        if allowed is not None and name not in allowed:
            raise UnsupportedCombination(
                f"adapter {adapter.name!r} does not work with {what} {name!r}",
                hint=f"it works with {_listed(allowed)}",
                param=_adapter_path(request, "type"),
            )


def _trained_on(method: Method) -> frozenset[str]:
    return formats.with_answers() if method.formats is None else method.formats


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


class _Settings:
    """The method's config: what was asked, what follows from the adapter and the data."""

    def __init__(
        self,
        request: JobRequest,
        method: Method,
        adapter: Adapter,
        training: DataFile,
        shape: ModelShape | None,
    ) -> None:
        self.method, self.adapter = method, adapter
        self.training, self.shape = training, shape
        self.path = f"method.{method.name}.hyperparameters"
        self.given = {
            key: value
            for key, value in request.method.hyperparameters.items()
            if value is not None and value != "auto"
        }

    def resolve(self, story: _Story) -> tuple[EntryConfig, float]:
        """The config, and the multiplier of the default learning rate that it amounts to."""
        given = dict(self.given)
        base = self.adapter.default_learning_rate * self.method.learning_rate_factor
        multiplier = self._multiplier(given, base)
        for key in given:
            if key not in self.method.Config.model_fields:
                known = [*self.method.Config.model_fields, "learning_rate_multiplier"]
                raise unknown_key(f"{self.path}.{key}", key, known)
        length, why_length = self._max_length()
        count = _examples(self.method, self.training, given.get("max_length", length))
        filled = {
            "learning_rate": (
                base * multiplier,
                f"default of {self.adapter.name} for {self.method.name}",
            ),
            "batch_size": (_batch_size(count), f"auto: {self._counted(count)}"),
            "max_length": (length, why_length),
        }
        for key, (value, why) in filled.items():
            if key in self.method.Config.model_fields and key not in given:
                given[key] = value
                story.note(f"method.config.{key}", why)
        config = validated(self.method.Config, given, self.path)
        for key in self.method.Config.model_fields:
            asked = key in self.given or (key == "learning_rate" and multiplier != 1)
            if asked or f"method.config.{key}" not in story.sources:
                story.note(f"method.config.{key}", "request" if asked else "default")
        self._check_length(config)
        if count < 10:
            story.warn(
                "too_few_examples",
                "training_file",
                f"{count} examples teach little; 50 is a start",
            )
        return config, getattr(config, "learning_rate", base) / base

    def _multiplier(self, given: dict[str, Any], base: float) -> float:
        path = f"{self.path}.learning_rate_multiplier"
        value = given.pop("learning_rate_multiplier", None)
        if value is None:
            return 1.0
        if "learning_rate" in given:
            raise InvalidConfig(
                f"{path}: give learning_rate or learning_rate_multiplier, not both",
                hint=f"the default learning rate here is {base:g}",
                param=path,
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise InvalidConfig(f"{path}: a number above 0 is expected", param=path)
        return float(value)

    def _counted(self, count: int) -> str:
        if isinstance(self.method, MakesExamples):
            return f"about {count} examples"
        return f"{count} rows"

    def _max_length(self) -> tuple[int, str]:
        if self.shape is None:
            return AUTO_MAX_LENGTH, "auto: the base model's context is not known yet"
        limit = self.shape.max_position_embeddings
        return min(AUTO_MAX_LENGTH, limit), f"auto: the base model's context is {limit}"

    def _check_length(self, config: Any) -> None:
        limit = self.shape.max_position_embeddings if self.shape else None
        if limit is not None and config.max_length > limit:
            raise InvalidConfig(
                f"{self.path}.max_length: {config.max_length} tokens, and the base model's context "
                f"is {limit}",
                hint=f"at most {limit}",
                param=f"{self.path}.max_length",
            )


def _batch_size(examples: int) -> int:
    size = 8 if examples <= 2_000 else 16 if examples <= 20_000 else 32
    return max(1, min(size, examples))


def _transforms(
    request: JobRequest, training: DataFile, story: _Story
) -> tuple[tuple[Use, ...], str]:
    """The transforms, and the format of the rows after the last one."""
    asked = request.ext.transforms
    story.note("transforms", "default" if asked is None else "request")
    if asked is None:
        templated = training.format in ("chat", "preference", "unpaired_preference", "prompt")
        asked = ({"type": "chat_template"},) if templated else ()
    uses = []
    read_as: str = training.format
    for i, given in enumerate(asked):
        path = f"ext.transforms.{i}"
        entry, config, use = _choose("transforms", given, path)
        if read_as not in entry.formats:
            raise UnsupportedCombination(
                f"transform {use.type!r} reads {_listed(entry.formats)} data, not {read_as} data",
                param=path,
            )
        read_as = entry.produces(config, read_as)
        uses.append(use)
    return tuple(uses), read_as


def _check_test(request: JobRequest, training: DataFile, test: DataFile | None) -> None:
    param = "ext.evaluation.test_file"
    if test is None and request.ext.evaluation.test_file is not None:
        raise UnsupportedCombination(
            "ext.evaluation.test_file is read by `tunery train` alone so far",
            hint="name the file as validation_file, or train with `tunery train`",
            param=param,
        )
    if test is not None and test.format != training.format:
        raise UnsupportedCombination(
            f"the training file is {training.format} data and the test file is {test.format} data",
            hint="both must have one format",
            param=param,
        )


def _data(
    training: DataFile, validation: DataFile | None, test: DataFile | None, story: _Story
) -> Data:
    """All files, their labels numbered together: in number order where all are numbers."""
    if validation is not None and validation.sha256 == training.sha256:
        story.warn(
            "train_valid_overlap",
            "validation_file",
            "the validation file is the training file: its loss will say nothing of unseen rows",
        )
    if training.labels is None:
        return Data(training=training, validation=validation, test=test)
    held_out = set((validation.labels if validation else None) or ())
    held_out |= set((test.labels if test else None) or ())
    unseen = held_out - set(training.labels)
    if unseen:
        story.warn(
            "unseen_labels",
            "validation_file",
            f"{len(unseen)} labels of the held-out rows are not trained",
        )
    labels = {"labels": tuple(sorted_labels({*training.labels, *held_out}))}
    return Data(
        training=training.model_copy(update=labels),
        validation=validation and validation.model_copy(update=labels),
        test=test and test.model_copy(update=labels),
    )


def _check_strategy(request: JobRequest, adapter: Adapter, compute: Compute) -> None:
    path = "ext.compute.strategy"
    if isinstance(adapter, InCache) and compute.gradient_checkpointing:
        raise UnsupportedCombination(
            f"adapter {adapter.name!r} lives in the attention's cache, and recomputing activations "
            "goes without one",
            hint="leave gradient_checkpointing out, or use lora or prompt",
            param="ext.compute.gradient_checkpointing",
        )
    if isinstance(adapter, Loads) and compute.device not in {"auto", *adapter.devices}:
        raise UnsupportedCombination(
            f"adapter {adapter.name!r} trains on {_listed(adapter.devices)}, and the workers offer "
            f"{compute.device}",
            param=_adapter_path(request, "type"),
        )
    if adapter.strategies is not None and compute.strategy not in adapter.strategies:
        raise UnsupportedCombination(
            f"adapter {adapter.name!r} does not train under {compute.strategy!r}",
            hint=f"it trains under {_listed(adapter.strategies)}",
            param=path,
        )
    if compute.strategy == "deepspeed_zero0" and compute.precision == "bf16":
        raise UnsupportedCombination(
            "deepspeed_zero0 keeps no float32 weights beside bfloat16 ones",
            hint="ddp does the same with them; or set ext.compute.precision to fp32",
            param=path,
        )


def _evaluation(
    request: JobRequest, task: Task, held_out: DataFile | None, story: _Story
) -> Evaluation:
    asked = request.ext.evaluation
    if asked.baseline and held_out is None:
        raise UnsupportedCombination(
            "ext.evaluation.baseline asks for a measurement and there is no held-out file",
            hint="upload one and name it as validation_file",
            param="ext.evaluation.baseline",
        )
    if asked.every_steps is not None and held_out is None:
        raise UnsupportedCombination(
            "ext.evaluation.every_steps asks for evaluations and there is no validation_file",
            hint="upload a held-out file and name it as validation_file",
            param="ext.evaluation.every_steps",
        )
    for name in asked.metrics or ():
        if name not in task.metrics:
            raise InvalidConfig(
                f"ext.evaluation.metrics: task {task.name!r} has no metric {name!r}",
                hint=f"known: {', '.join(task.metrics)}",
                param="ext.evaluation.metrics",
            )
    story.note("evaluation.metrics", "request" if asked.metrics else f"default of {task.name}")
    return Evaluation(
        every_steps=asked.every_steps,
        metrics=asked.metrics or task.default_metrics,
        baseline=asked.baseline,
        predictions=asked.predictions,
    )


def _output(request: JobRequest, adapter: Any) -> Output:
    if request.ext.output.merge and not adapter.mergeable:
        raise UnsupportedCombination(
            f"the result of adapter {adapter.name!r} cannot be merged into the base",
            hint="leave ext.output.merge out",
            param="ext.output.merge",
        )
    return Output(merge=request.ext.output.merge)


def _checkpoints(request: JobRequest, steps: int, story: _Story) -> Checkpoints:
    asked = request.ext.checkpoints
    every = asked.every_steps
    if every == "auto":
        every = min(200, max(10, math.ceil(steps / 5)))
        story.note("checkpoints.every_steps", f"auto: {steps} steps")
    return Checkpoints(every_steps=every, keep=asked.keep)


def _estimate(
    spec: TrainingSpec,
    config: Any,
    steps: int,
    count: int,
    load: Load | None,
    devices: DeviceFacts,
) -> dict[str, Any]:
    """Steps, tokens, memory and time before anything runs, with the basis said.

    FLOPs per token are 4N for an adapter on frozen weights (no weight gradient) and 6N for full
    training, and 2N more where activations are recomputed; time is given as a range, because the
    device's sustained rate is assumed.
    """
    examples = steps * min(config.batch_size, count)
    per_example = spec.data.training.size_bytes / max(1, count) / BYTES_PER_TOKEN
    tokens = int(examples * min(per_example, config.max_length))
    basis = {"steps": steps, "train_tokens": tokens, "basis": "modelled"}
    if load is None:
        return {"available": False, "reason": "base_model_not_imported", **basis}
    shape, trainable = load.shape, load.trainable
    per_parameter = 6 if trainable >= shape.parameters else 4
    per_parameter += 2 if spec.compute.gradient_checkpointing else 0
    flops = per_parameter * shape.parameters * tokens
    seconds = flops / (devices.flops_per_s * spec.compute.gpus * spec.compute.nodes)
    memory = memory_needed(load, spec.compute)
    return {
        "available": True,
        **basis,
        "trainable_parameters": trainable,
        "total_parameters": shape.parameters,
        "gpu": {
            "type": devices.kind,
            "count": spec.compute.gpus * spec.compute.nodes,
            "memory_bytes_needed": memory,
            "fits": None if devices.memory_bytes is None else memory <= devices.memory_bytes,
        },
        "seconds": {"low": seconds * 0.5, "mid": seconds, "high": seconds * 3},
        "gpu_seconds": seconds * spec.compute.gpus * spec.compute.nodes,
    }
