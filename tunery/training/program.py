"""One rank's whole life: from an order to a checkpoint, or to a failure with a name."""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
import platform
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
import transformers
from transformers import AutoTokenizer

from tunery import catalogue
from tunery.data.read import read_rows
from tunery.data.validate import OVERLAP, overlap
from tunery.entries import Loads, Rated, Stepping
from tunery.errors import AppError, BaseModelUnavailable, InvalidData
from tunery.resolve import total_steps
from tunery.training import packing, protocol
from tunery.training.checkpoint import Checkpoints, load_state, load_weights, restore_rng
from tunery.training.encoding import ENCODER_VERSION, template_sha256
from tunery.training.engines import engine_for
from tunery.training.failures import failure
from tunery.training.features import switches
from tunery.training.hooks import StepsRun
from tunery.training.loop import Loop, LoopSettings, LoopState
from tunery.training.losses import HeadPolicy, TokenLossComputer
from tunery.training.memory import peak_bytes
from tunery.training.merging import MUCH_LOST, merge
from tunery.training.optimizer import OptimizerSettings
from tunery.training.predictions import write_predictions
from tunery.training.preflight import inspect
from tunery.training.store import build, cache_key
from tunery.training.types import (
    AdapterRun,
    EncodeOptions,
    FurtherModel,
    MethodRun,
    Prepares,
    Regroups,
    examples_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunery.entries import Hyperparameters
    from tunery.spec import DataFile, Use
    from tunery.training.control import StopFlag
    from tunery.training.engines import Engine
    from tunery.training.hooks import StepHook
    from tunery.training.preflight import Preflight
    from tunery.training.protocol import Event, RunOrder
    from tunery.training.store import TokenStore
    from tunery.training.types import Batch, Evaluated, Example, Layout, Objective, TaskRuntime

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREFLIGHT_ROWS = 5000
"""At 23 microseconds a row."""
OVERLAP_ROWS = 50_000
"""Of either file, compared in search of common ones, at 24 microseconds a row."""
_WITHOUT_EFFECT = {"compute", "checkpoints", "evaluation", "limits", "output"}
"""Parts of a spec that a resumed run may change: they do not decide what is learnt."""


def run(order: RunOrder, workdir: Path, emit: Callable[[Event], None], stop: StopFlag) -> int:
    """Train as ordered; returns one of `protocol`'s exit codes.

    Every failure ends in a FailureEvent and `EXIT_FAILED`; only what is meant to end the process
    (SystemExit, KeyboardInterrupt) passes through. Rank and world come from torch elastic's
    environment.
    """
    speaker = Speaker(order.run, emit, speaks=int(os.environ.get("RANK", "0")) == 0)
    trainer = Trainer(order, workdir, speaker, stop)
    try:
        return protocol.EXIT_DONE if trainer.train() else protocol.EXIT_STOPPED
    except Exception as error:  # the edge of the process: the supervisor has to be told
        traceback.print_exc()
        speaker.say_anyway(failure(order.run, error, trainer.step))
        return protocol.EXIT_FAILED
    finally:
        trainer.close()


class Speaker:
    """Events in the words of the protocol; the loop's `Reporter`. Threads may share it."""

    def __init__(self, run: str, emit: Callable[[Event], None], *, speaks: bool) -> None:
        self._run, self._emit, self._speaks = run, emit, speaks
        self._lock = threading.Lock()

    def say_anyway(self, event: Event) -> None:
        """From any rank."""
        with self._lock:
            self._emit(event)

    def say(self, kind: type[Any], **values: Any) -> None:
        """From rank 0."""
        if self._speaks:
            self.say_anyway(kind(run=self._run, at=time.time(), **values))

    def phase(self, name: str) -> None:
        self.say(protocol.PhaseEvent, phase=name)

    def metrics(
        self,
        step: int,
        epoch: float,
        values: Mapping[str, float],
        trained_tokens: int,
        seconds_remaining: float | None,
    ) -> None:
        self.say(
            protocol.MetricsEvent,
            step=step,
            epoch=epoch,
            values={name: value for name, value in values.items() if math.isfinite(value)},
            trained_tokens=trained_tokens,
            seconds_remaining=seconds_remaining,
        )

    def warning(self, code: str, message: str, **data: Any) -> None:
        self.say(protocol.WarningEvent, code=code, message=message, data=data)

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, float], final: bool) -> None:
        self.say(
            protocol.CheckpointEvent,
            step=step,
            path=str(folder.absolute()),
            kinds=("export", "resume"),
            metrics=metrics,
            final=final,
        )


@dataclass(slots=True)
class _Entries:
    """What the spec names, found and configured."""

    task: Any
    method: Any
    adapter: Any
    task_config: Any
    config: Hyperparameters
    adapter_config: Any


class Trainer:
    """Puts a run together from its order, and trains it."""

    def __init__(self, order: RunOrder, workdir: Path, speaker: Speaker, stop: StopFlag) -> None:
        self.order, self.spec, self.workdir = order, order.spec, workdir
        self.speaker, self.stop = speaker, stop
        self.state = LoopState()
        self.engine: Engine | None = None
        self.checkpoints: Checkpoints | None = None
        self.seen: dict[str, Evaluated] = {}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    def close(self) -> None:
        """Leave the other ranks."""
        if self.engine is not None:
            self.engine.close()

    def train(self) -> bool:
        """True when done, False when stopped as told.

        Raises:
            AppError: what stands in the way; see `Loop.run` and the entries.
        """
        self.speaker.phase("preparing")
        self.switches = switches(self.spec.compute.without)
        self.device = _device(self.spec.compute.device)
        self.dtype = _DTYPES[self.spec.compute.precision]
        self.engine = engine = engine_for(self.spec.compute.strategy, self.spec.compute.offload)
        engine.start(self.device)
        entries = self.entries = self._entries()
        self.task = entries.task.runtime(entries.task_config)
        self.tokenizer = tokenizer_for(self.task, Path(self.order.base_model_path))
        self.model = self._model()
        self.base = base_of(self.model)
        self.losses = TokenLossComputer(self.base, self._head_policy())
        self.objective: Objective = entries.method.objective(entries.config, self._method_run())
        self.training, self.validation, self.test = self._stores()
        self.preflight = self._preflight()
        self._warn_of_overlap()
        self.hook = self._hook()
        engine.prepare(self.model, self._optimizer_settings())
        self.layout = self._layout()
        self._precompute()
        self._resume()
        self._start_event()
        return self._loop()

    # Parts

    def _entries(self) -> _Entries:
        spec = self.spec
        task = catalogue.find("tasks", spec.task.type)
        method = catalogue.find("methods", spec.method.type)
        adapter = catalogue.find("adapters", spec.adapter.type)
        return _Entries(
            task=task,
            method=method,
            adapter=adapter,
            task_config=task.Config.model_validate(spec.task.config),
            config=cast("Hyperparameters", method.Config.model_validate(spec.method.config)),
            adapter_config=adapter.Config.model_validate(spec.adapter.config),
        )

    def _model(self) -> nn.Module:
        adapter, config = self.entries.adapter, self.entries.adapter_config
        loads = adapter if isinstance(adapter, Loads) else None
        torch.manual_seed(self.spec.seed)  # A classification head is drawn while loading.
        base: PreTrainedModel = self.task.load_model(
            Path(self.order.base_model_path),
            dtype=self.dtype,
            labels=self.spec.data.training.labels,
            **(loads.load_options(config, self.device, self.dtype) if loads else {}),
        )
        base.config.use_cache = False
        assert self.engine is not None
        placed = loads is not None or self.engine.places_model
        if not placed:
            base.to(self.device)  # type: ignore[arg-type]
        adapter_run = AdapterRun(
            model=base,
            task_type=self.task.peft_task_type,
            tokenizer=self.tokenizer,
            seed=self.spec.seed,
            base_model_name=self.spec.model.name,
            revision=self.spec.model.revision,
        )
        model: nn.Module = adapter.apply(config, adapter_run)
        if not placed:
            model.to(self.device)
        if self.order.init_path:
            load_weights(model, Path(self.order.init_path))
        if self._half_adapter:
            _cast_trained(model, self.dtype)
        if self.spec.compute.gradient_checkpointing:
            _recompute(base)
        if not self.switches.frozen_prefix:
            cast("Any", base).enable_input_require_grads()
        return model

    @property
    def _half_adapter(self) -> bool:
        """Whether what trains runs in the base's precision."""
        wanted = self.switches.half_adapters and self.dtype != torch.float32
        return wanted and self.entries.adapter.half_precision

    def _head_policy(self) -> HeadPolicy:
        return HeadPolicy(
            compact=self.switches.label_compaction,
            path="auto" if self.switches.chunked_head else "plain",
        )

    def _method_run(self) -> MethodRun:
        self.reference: Callable[[], AbstractContextManager[Any]] | None = None
        disabled = self.entries.adapter.base_when_disabled(self.entries.adapter_config)
        if disabled and not self.order.init_path:
            self.reference = cast("Any", self.model).disable_adapter
        return MethodRun(
            task=self.task,
            token_losses=self.losses,
            reference=self.reference,
            seed=self.spec.seed,
            losses_of=lambda model: TokenLossComputer(base_of(model), self._head_policy()),
            tokenizer=self.tokenizer,
            further_model=self._further_model,
        )

    def _further_model(self, name: str) -> FurtherModel:
        """One of the base models that the method reads beside the one that trains.

        Raises:
            BaseModelUnavailable: it is not on this machine, or the task cannot load it.
        """
        folder = self.order.model_paths.get(name)
        if folder is None:
            raise BaseModelUnavailable(f"the run was not told where {name[:200]!r} lies")
        model = self.task.load_model(Path(folder), dtype=self.dtype, labels=None)
        model.to(self.device).requires_grad_(False)
        return FurtherModel(model, load_tokenizer(Path(folder)))

    def _layout(self) -> Layout:
        """packed where the device has a kernel for it and the model keeps documents apart."""
        wanted = self.switches.packing and self.entries.config.packing
        half = self.dtype != torch.float32
        if not (wanted and half and self.device.type == "cuda" and "packed" in self.task.layouts):
            return "rows"
        if any(c.is_prompt_learning for c in getattr(self.model, "peft_config", {}).values()):
            return "rows"
        before = self.base.config._attn_implementation
        if not packing.switch_on(self.base):
            return "rows"
        vocabulary = int(self.base.config.get_text_config().vocab_size)
        if packing.isolates(self.model, self.losses, vocabulary):
            return "packed"
        packing.switch_off(self.base, before)
        return "rows"

    def _optimizer_settings(self) -> OptimizerSettings:
        config = self.entries.config
        steps = self.total_steps
        warmup = config.warmup_steps
        return OptimizerSettings(
            learning_rate=config.learning_rate,
            schedule=config.lr_scheduler_type,
            warmup_steps=math.ceil(config.warmup_ratio * steps) if warmup is None else warmup,
            total_steps=steps,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            epsilon=config.adam_epsilon,
            max_grad_norm=config.max_grad_norm,
            flat=self.switches.flat_optimizer,
            rate=self._rate,
            hook=self.hook,
        )

    @property
    def _rate(self) -> Callable[[str], float] | None:
        """The adapter's multipliers of the learning rate, where it has any."""
        adapter = self.entries.adapter
        if not isinstance(adapter, Rated):
            return None
        return functools.partial(adapter.rate, self.entries.adapter_config)

    def _hook(self) -> StepHook | None:
        """What the adapter does in each step, where it does anything."""
        adapter = self.entries.adapter
        if not isinstance(adapter, Stepping):
            return None
        run = StepsRun(self.model, self.total_steps, self.spec.seed)
        return adapter.hook(self.entries.adapter_config, run)

    @property
    def total_steps(self) -> int:
        return total_steps(self.entries.config, len(self.training))

    # Data

    def _stores(self) -> tuple[TokenStore, TokenStore | None, TokenStore | None]:
        """Rank 0 encodes, the others map what it wrote."""
        assert self.engine is not None
        data, order = self.spec.data, self.order
        files = [
            (data.training, order.training_path),
            (data.validation, order.validation_path),
            (data.test, order.test_path),
        ]
        if self.engine.rank:
            self.engine.barrier()
        stores = [
            self._store(file, path, held_out=number > 0) if file and path else None
            for number, (file, path) in enumerate(files)
        ]
        if self.engine.rank == 0:
            self.engine.barrier()
        training, validation, test = stores
        assert training is not None
        return training, validation, test

    def _store(self, file: DataFile, path: str, held_out: bool) -> TokenStore:
        _prime(self.spec.transforms, self.tokenizer)
        options = self._encode_options(file)
        key = cache_key(
            {
                "version": ENCODER_VERSION,
                "data": file.model_dump(mode="json", exclude={"file_id"}),
                "held_out": held_out,
                "options": asdict(options),
                "transforms": [use.model_dump(mode="json") for use in self.spec.transforms],
                "task": self.spec.task.model_dump(mode="json"),
                "method": self.spec.method.type,
                "grouping": self._regroups.grouping if self._regroups else None,
                "tokenizer": _tokenizer_sha256(self.tokenizer, Path(self.order.base_model_path)),
            }
        )
        kept = self.switches.token_cache and self.order.cache_dir
        root = Path(self.order.cache_dir or "") if kept else self.workdir / "tokens"
        examples = self._examples(file, path, options, held_out)
        if self._regroups:
            examples = self._regroups.regroup(examples)
        try:
            store = build(examples, self.objective.units, root / key)
        except InvalidData as error:
            if held_out and error.code == "invalid_training_file":
                raise InvalidData(error.message, code="invalid_validation_file") from error
            raise
        if not store.units.any():
            raise InvalidData(
                f"no token of the {'validation' if held_out else 'training'} file would be learnt",
                code="invalid_validation_file" if held_out else "no_trainable_tokens",
                hint="look at `tunery data preview`; replies may be missing, have weight 0, or "
                "begin after max_length tokens",
            )
        return store

    def _encode_options(self, file: DataFile) -> EncodeOptions:
        format = file.format
        for use in self.spec.transforms:
            transform, config = _transform(use)
            format = transform.produces(config, format)
        config = self.entries.config
        return EncodeOptions(
            format=format,
            max_length=config.row_length,
            train_on=getattr(config, "train_on", "assistant"),
            labels=file.labels,
            whole=self._regroups is not None,
            score_prompts=getattr(self.objective, "scores_prompts", False),
        )

    @property
    def _regroups(self) -> Regroups | None:
        return self.objective if isinstance(self.objective, Regroups) else None

    def _examples(
        self, file: DataFile, path: str, options: EncodeOptions, held_out: bool
    ) -> Iterator[Example]:
        rows = [row for _, row in read_rows(Path(path), file.suffix, file.format)]
        for use in self.spec.transforms:
            transform, config = _transform(use)
            rows = transform.apply(config, rows, self.tokenizer)
        for number, row in enumerate(rows):
            encoded = self.task.encode(row, self.tokenizer, options, number)
            for example in examples_of(encoded):
                yield replace(example, index=-1 - number) if held_out else example

    def _preflight(self) -> Preflight:
        """Look at the training data, or at evenly spaced rows of much of it.

        Raises:
            InvalidData: nothing would be learnt.
        """
        store = self.training
        stride = -(-len(store) // PREFLIGHT_ROWS)
        found = inspect(
            (store[number] for number in range(0, len(store), stride)),
            self.tokenizer,
            self._encode_options(self.spec.data.training),
            pad_id=self._pad_id,
        )
        if stride == 1:
            found.check()
        if self.order.resume_path is None:
            for finding in found.findings:
                self.speaker.warning(
                    finding.code,
                    finding.message,
                    hint=finding.hint,
                    rows=finding.rows,
                    first_rows=list(finding.first_rows),
                )
        return found

    def _warn_of_overlap(self) -> None:
        """Say how many validation rows are trained on."""
        assert self.engine is not None
        training, validation = self.spec.data.training, self.spec.data.validation
        path = self.order.validation_path
        if self.engine.rank or self.order.resume_path or validation is None or path is None:
            return
        if training.format != validation.format:
            return
        trained = read_rows(Path(self.order.training_path), training.suffix, training.format)
        held_out = read_rows(Path(path), validation.suffix, validation.format)
        found = overlap(
            islice(trained, OVERLAP_ROWS), islice(held_out, OVERLAP_ROWS), training.format
        )
        count = found.problem_counts.get(OVERLAP, 0)
        if count:
            self.speaker.warning(
                OVERLAP,
                f"{count} of {min(validation.rows, OVERLAP_ROWS)} validation rows are in the "
                "training file too: the held-out loss measures memory as well",
                hint="remove them from one of the two files",
                rows=count,
                first_lines=[problem["line"] for problem in found.problems[:8]],
            )

    def _precompute(self) -> None:
        """Let the objective look at the untrained model."""
        self.model.train(False)
        self.objective.prepare(self.model, self._all_batches())

    def _all_batches(self) -> Iterator[Batch]:
        budget = self.spec.compute.micro_batch_tokens
        for store in (self.training, self.validation):
            if store is None:
                continue
            for start in range(0, len(store), 256):
                yield from self._window(store, start, budget)

    def _window(self, store: TokenStore, start: int, budget: int) -> Iterator[Batch]:
        import numpy as np

        from tunery.training.batching import cut

        chosen = np.arange(start, min(start + 256, len(store)))
        shape = (store.longest, store.tokens, store.documents)
        for members in cut(chosen, *shape, budget, self.layout):
            batch = self.task.collate(
                [store[number] for number in members], layout=self.layout, pad_id=self._pad_id
            )
            yield batch.to(self.device)

    @property
    def _pad_id(self) -> int:
        """Any token will do: padding is told apart by position, never by id."""
        return int(self.tokenizer.pad_token_id or 0)

    # Training

    def _resume(self) -> None:
        assert self.engine is not None
        if self.order.resume_path is not None:
            folder = Path(self.order.resume_path)
            self.state = load_state(folder, self._fingerprint)
            self.engine.restore(folder, self.state.step, self.state.earlier_updates)
            restore_rng(folder, self.engine.rank)
        elif self.order.init_resume_path is not None:
            folder = Path(self.order.init_resume_path)
            before = load_state(folder, fingerprint=None)
            self.state.earlier_updates = before.step + before.earlier_updates
            self.engine.restore(folder, 0, self.state.earlier_updates)

    @property
    def _fingerprint(self) -> str:
        return hashlib.sha256(
            self.spec.model_dump_json(exclude=_WITHOUT_EFFECT).encode()
        ).hexdigest()

    def _loop(self) -> bool:
        assert self.engine is not None
        spec, config = self.spec, self.entries.config
        checkpoints = Checkpoints(
            self.workdir / "checkpoints",
            engine=self.engine,
            model=self.model,
            tokenizer=self.tokenizer,
            manifest={
                "spec": spec.model_dump(mode="json"),
                "spec_sha256": spec.sha256(),
                "features": self._features(),
            },
            fingerprint=self._fingerprint,
            announce=self.speaker.checkpoint,
            finish=self._finish_export,
            background=self.switches.async_checkpoints,
            files=self.task.export_files(),
        )
        loop = Loop(
            engine=self.engine,
            objective=self.objective,
            task=self.task,
            train=self.training,
            valid=self.validation,
            test=self.test,
            reference=self.reference,
            settings=LoopSettings(
                total_steps=self.total_steps,
                batch_size=config.batch_size,
                seed=spec.seed,
                micro_batch_tokens=spec.compute.micro_batch_tokens,
                layout=self.layout,
                pad_id=self._pad_id,
                logging_steps=config.logging_steps,
                evaluate_every=spec.evaluation.every_steps,
                checkpoint_every=spec.checkpoints.every_steps,
                metrics=spec.evaluation.metrics,
                baseline=spec.evaluation.baseline,
                calibration_steps=self.hook.calibration_steps if self.hook else 0,
                switches=replace(
                    self.switches, length_split=self.switches.length_split and config.packing
                ),
            ),
            device=self.device,
            reporter=self.speaker,
            saver=checkpoints,
            stop=self.stop,
            state=self.state,
            tokenizer=self.tokenizer,
            labels=spec.data.training.labels or (),
        )
        self.seen = loop.seen
        try:
            done = loop.run()
        finally:
            checkpoints.close()
        if done:
            self.speaker.say(
                protocol.DoneEvent,
                step=self.state.step,
                trained_tokens=self.state.trained_tokens,
                metrics=self.state.metrics,
                peak_memory_bytes=peak_bytes(self.device),
            )
        return done

    def _finish_export(self, export: Path) -> None:
        """What a finished run leaves beside its adapter, before the checkpoint is published."""
        if self.spec.evaluation.predictions:
            write_predictions(export, self.seen, self.task)
        if not self.spec.output.merge:
            return
        report = merge(Path(self.order.base_model_path), export, export / "merged")
        if report.lost > MUCH_LOST:
            self.speaker.warning(
                "merge_inexact",
                f"merged in {report.dtype}, the model loses {report.lost:.0%} of the adapter's "
                "effect on the logits; the adapter beside it is exact",
                **asdict(report),
            )

    def _start_event(self) -> None:
        parameters = list(self.model.parameters())
        self.speaker.say(
            protocol.StartEvent,
            total_steps=self.total_steps,
            start_step=self.state.step,
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            total_parameters=sum(p.numel() for p in parameters),
            examples=len(self.training),
            tokens_per_epoch=self.training.total_tokens,
            trained_tokens_per_epoch=int(self.training.supervised.sum()),
            features=self._features(),
        )

    def _features(self) -> dict[str, Any]:
        """Which optimisations are active, and what the numbers depend on."""
        on, cuda = self.switches, self.device.type == "cuda"
        assert self.engine is not None
        packed = self.layout == "packed"
        return {
            "packing": packed,
            "length_split": on.length_split and not packed and self.entries.config.packing,
            "label_compaction": on.label_compaction,
            "chunked_head": on.chunked_head,
            "deferred_metrics": on.deferred_metrics,
            "half_adapters": self._half_adapter,
            "flat_optimizer": on.flat_optimizer,
            "frozen_prefix": on.frozen_prefix,
            "token_cache": on.token_cache and self.order.cache_dir is not None,
            "async_checkpoints": on.async_checkpoints and self.engine.world == 1,
            "prefetch": on.prefetch and cuda,
            "memory_probe": on.memory_probe and cuda,
            "gradient_checkpointing": self.spec.compute.gradient_checkpointing,
            "layout": self.layout,
            "strategy": self.spec.compute.strategy,
            "offload": self.spec.compute.offload,
            "ranks": self.engine.world,
            "precision": self.spec.compute.precision,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": torch.get_num_threads(),
            "attention": self.base.config._attn_implementation,
            "chat_template_sha256": template_sha256(self.tokenizer),
            "special_tokens": self.tokenizer.special_tokens_map,
            "preflight": self.preflight.model_dump(mode="json"),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
        }


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def tokenizer_for(task: TaskRuntime, path: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, or what stands for it where the task reads no text.

    Raises:
        BaseModelUnavailable: there is none.
    """
    return task.load_tokenizer(path) if isinstance(task, Prepares) else load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, from its folder, running none of its code.

    Raises:
        BaseModelUnavailable: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelUnavailable(
            f"no tokenizer could be loaded ({type(error).__name__})",
            hint="import the base model again, with its tokenizer files",
        ) from error
    return tokenizer


def _device(asked: str) -> torch.device:
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AppError("a CUDA device is asked for and there is none", code="capacity_unavailable")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _recompute(base: Any) -> None:
    """Keep no activations of the blocks; the non-reentrant kind, which needs no input gradients."""
    enable = getattr(base, "activation_checkpointing_enable", None)  # transformers >= 5.20
    (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})


def _cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Run what trains in the base's precision; the optimizer keeps float32 masters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _transform(use: Use) -> tuple[Any, Any]:
    transform = catalogue.find("transforms", use.type)
    return transform, transform.Config.model_validate(use.config)


def _prime(uses: Sequence[Use], tokenizer: PreTrainedTokenizerBase) -> None:
    """Let transforms set the tokenizer's template, also when all rows are cached."""
    for use in uses:
        transform, config = _transform(use)
        transform.apply(config, [], tokenizer)


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Of the tokenizer's files, and of the template that a transform may have set."""
    digest = hashlib.sha256((template_sha256(tokenizer) or "").encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """A cold start: `python -m tunery.training.program WORKDIR [--events-fd N]`."""
    from tunery.training.launch import launch

    parser = argparse.ArgumentParser(prog="tunery.training.program")
    parser.add_argument("workdir", type=Path, help="folder with run.json")
    parser.add_argument("--events-fd", type=int, default=1, help="where events are written")
    given = parser.parse_args(argv)
    return launch(given.workdir, given.events_fd)


if __name__ == "__main__":
    sys.exit(main())
