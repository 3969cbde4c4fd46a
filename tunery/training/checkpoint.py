"""Checkpoints: written whole or not at all, and read back to the very state.

    step-00000040/export/   what PEFT (or transformers) loads; tokenizer, card, training.json beside
                  resume/   state.json, optimizer.safetensors, rng-rank0.{json,safetensors}

Tensors are safetensors, the rest is JSON: loading a checkpoint never runs its bytes. The folder is
written under another name, synced and renamed; whoever sees its name sees all of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunery.errors import CheckpointCorrupt
from tunery.training.card import model_card, vllm_obstacles
from tunery.training.loop import LoopState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from tunery.training.engines import Engine

VERSION = 1
STATE = "state.json"


class Checkpoints:
    """Writes a run's checkpoints; the loop's `Saver`.

    Args:
        folder: `checkpoints` in the work directory; all ranks of this host see it.
        model: bare, not wrapped by an engine.
        manifest: goes into `export/training.json`.
        fingerprint: what a resumed run must have in common with this one.
        announce: called with step, folder, the latest metrics and whether it is the last one, once
            the folder is complete; from the writing thread.
        finish: called with the last checkpoint's export folder, to put more into it.
        background: write while training goes on; one rank only.
        files: JSON documents that every export has too, by relative path.
    """

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        manifest: Mapping[str, Any],
        fingerprint: str,
        announce: Callable[[int, Path, dict[str, float], bool], None],
        finish: Callable[[Path], None],
        background: bool = True,
        files: Mapping[str, Any] | None = None,
    ) -> None:
        self._files = files or {}
        self._folder, self._engine, self._model = folder, engine, model
        self._tokenizer, self._manifest = tokenizer, manifest
        self._fingerprint, self._announce, self._finish = fingerprint, announce, finish
        alone = engine.world == 1
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background and alone else None
        self._writing: Future[None] | None = None

    def save(self, state: LoopState, *, final: bool) -> None:
        """Copy everything now; write it now, or in the background."""
        self.wait()
        write = self._snapshot(state, final)
        if self._pool is None:
            write()
        else:
            self._writing = self._pool.submit(write)
        if final:
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is complete; raises what writing it raised."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Finish writing and let the thread go."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _snapshot(self, state: LoopState, final: bool) -> Callable[[], None]:
        first = self._engine.rank == 0
        weights = self._engine.weights()
        export = export_writer(self._model, weights) if first else None
        engine_files = self._engine.snapshot()
        generators = rng_state()
        said = {"version": VERSION, "fingerprint": self._fingerprint, **asdict(state)}
        said = json.loads(json.dumps(said))
        target = self._folder / f"step-{state.step:08d}"

        def write() -> None:
            temporary = target.with_name(f".{target.name}.partial")
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / "resume").mkdir(parents=True)
            self._engine.barrier()
            engine_files(temporary / "resume")
            write_rng(generators, temporary / "resume", self._engine.rank)
            if export is not None:
                self._write_first(export, said, temporary)
                if final:
                    self._finish(temporary / "export")
            self._engine.barrier()
            if first:
                _publish(temporary, target)
                self._announce(said["step"], target, said["metrics"], final)

        return write

    def _write_first(
        self, export: Callable[[Path], None], said: dict[str, Any], temporary: Path
    ) -> None:
        """What rank 0 alone writes."""
        write_json(temporary / "resume" / STATE, said)
        folder = temporary / "export"
        folder.mkdir()
        export(folder)
        self._tokenizer.save_pretrained(folder)
        for path, document in self._files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            write_json(folder / path, document)
        about = {
            **self._manifest,
            **{key: said[key] for key in ("step", "trained_tokens", "metrics")},
            "vllm": {"ready": not (obstacles := vllm_obstacles(self._model)), "why_not": obstacles},
        }
        write_json(folder / "training.json", about)
        card = model_card(self._model, about, said["step"])
        (folder / "README.md").write_text(card, encoding="utf-8")


def export_writer(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """Copies what is to be exported; the result writes it to an empty folder.

    An adapter becomes `adapter_config.json` and `adapter_model.safetensors`, a fully trained model
    what `from_pretrained` reads.

    Args:
        weights: trained parameters by name, on the CPU.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return _adapter_writer(model, weights)
    copies = {
        id(parameter): weights[name]
        for name, parameter in model.named_parameters()
        if name in weights
    }
    state = {
        # Tied parameters have one copy under both names, which is how transformers knows them.
        name: copies[id(value)] if id(value) in copies else value.detach().cpu().clone()
        for name, value in model.state_dict(keep_vars=True).items()
    }
    return lambda folder: model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]


def _adapter_writer(model: Any, weights: Mapping[str, Tensor]) -> Callable[[Path], None]:
    from peft import get_peft_model_state_dict

    name = model.active_adapter
    found = get_peft_model_state_dict(
        model,
        state_dict={**model.state_dict(), **weights},
        adapter_name=name,
        save_embedding_layers=False,
    )
    state = {key: value.detach().cpu().contiguous().clone() for key, value in found.items()}
    config = model.peft_config[name]

    def write(folder: Path) -> None:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        before, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(folder)
        finally:
            config.inference_mode = before
        if config.task_type != "CAUSAL_LM":
            # The labels' names and number, which the base's own config does not know.
            model.get_base_model().config.save_pretrained(folder)

    return write


def load_weights(model: nn.Module, folder: Path) -> None:
    """Start from an earlier export: its weights into this model, which has the same adapter.

    Raises:
        CheckpointCorrupt: the export is of another adapter or model.
    """
    from peft import PeftModel, set_peft_model_state_dict

    try:
        if isinstance(model, PeftModel):
            state = load_file(folder / "adapter_model.safetensors")
            outcome = set_peft_model_state_dict(model, state, adapter_name=model.active_adapter)
        else:
            outcome = model.load_state_dict(_model_files(folder), strict=False)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointCorrupt(
            f"the checkpoint to start from does not fit this run ({type(error).__name__})",
            hint="use the base model and adapter settings that it was made with",
        ) from error
    if foreign := list(cast("Any", outcome).unexpected_keys):
        raise CheckpointCorrupt(
            f"the checkpoint to start from has {len(foreign)} tensors that this run lacks",
            hint="use the base model and adapter settings that it was made with",
        )


def _model_files(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    if not state:
        raise FileNotFoundError("no safetensors")
    return state


def load_state(folder: Path, fingerprint: str | None) -> LoopState:
    """What the loop continues from.

    Args:
        fingerprint: of this run; None: another run's state is welcome.

    Raises:
        CheckpointCorrupt: unreadable, of another version, or of another run.
    """
    try:
        said = json.loads((folder / STATE).read_text("utf-8"))
        version, of = said.pop("version"), said.pop("fingerprint")
        state = LoopState(**said)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{STATE} cannot be read ({type(error).__name__})") from error
    if version != VERSION:
        raise CheckpointCorrupt(f"the checkpoint has version {version}, this trainer {VERSION}")
    if fingerprint is not None and of != fingerprint:
        raise CheckpointCorrupt(
            "the checkpoint is of a run with other data or settings",
            hint="start a new job with ext.init_from to go on from its weights",
        )
    return state


def rng_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All generators of this process: plain JSON and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(place), int(has_gauss), float(cached)],
    }
    return plain, tensors


def write_rng(state: tuple[dict[str, Any], dict[str, Tensor]], folder: Path, rank: int) -> None:
    plain, tensors = state
    write_json(folder / f"rng-rank{rank}.json", plain)
    save_file(tensors, folder / f"rng-rank{rank}.safetensors")


def restore_rng(folder: Path, rank: int) -> None:
    """Set all generators; a rank that the checkpoint did not have keeps its own.

    Raises:
        CheckpointCorrupt: unreadable.
    """
    path = folder / f"rng-rank{rank}.json"
    if not path.exists():
        return
    try:
        plain = json.loads(path.read_text("utf-8"))
        tensors = load_file(folder / f"rng-rank{rank}.safetensors")
        version, words, gauss = plain["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = plain["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointCorrupt(f"{path.name} cannot be read ({type(error).__name__})") from error


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def _publish(temporary: Path, target: Path) -> None:
    """Make the folder durable, then visible."""
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
