"""One training run, fully resolved. Plain pydantic: JSON in and out, hashable.

Nothing in a `TrainingSpec` is "auto" and nothing in it is a path of some machine: a spec means the
same run wherever it is read. Where its files lie is the `RunOrder`'s business
(`tunery.training.protocol`).
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunery.entries import DataFormat

Strategy = Literal[
    "single",
    "ddp",
    "fsdp",
    "deepspeed_zero0",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero3",
]
Offload = Literal["none", "optimizer", "parameters"]
Precision = Literal["fp32", "bf16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Use(_Frozen):
    """An entry of a shelf with its settings, all of them given."""

    type: str
    config: dict[str, Any] = Field(default_factory=dict)


class BaseModelRef(_Frozen):
    """The frozen weights that training starts from."""

    name: str = Field(description="As `tunery models list` shows it, or a hub id.")
    revision: str | None = Field(
        None, description="Commit of a hub model; None for an imported one."
    )


class DataFile(_Frozen):
    """A data file by content, not by place."""

    file_id: str
    sha256: str
    format: DataFormat = Field(pattern=r"^[a-z][a-z0-9_]*$")
    rows: int
    size_bytes: int
    suffix: Literal[".jsonl", ".jsonl.gz", ".csv", ".parquet", ".txt"] = ".jsonl"
    labels: tuple[str, ...] | None = Field(
        None, description="Classification: label names in id order, over all files."
    )


class Data(_Frozen):
    training: DataFile
    validation: DataFile | None = None
    test: DataFile | None = Field(None, description="Measured once, after the last step.")


class Compute(_Frozen):
    """How many devices, and how they cooperate."""

    gpus: int = Field(1, ge=1, description="Ranks per node; processes on a machine without GPUs.")
    nodes: int = Field(1, ge=1)
    strategy: Strategy = "single"
    offload: Offload = Field("none", description="What waits in the host's memory.")
    precision: Precision = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False
    micro_batch_tokens: int = Field(
        4096,
        ge=8,
        description="Tokens a micro-batch may hold on one rank; memory, not mathematics.",
    )
    without: tuple[str, ...] = Field(
        (), description="Optimisations to leave out, by their names in `features`; to compare."
    )


class Evaluation(_Frozen):
    every_steps: int | None = Field(None, ge=1, description="None: at the end of each epoch.")
    metrics: tuple[str, ...] = ("loss",)
    baseline: bool = Field(False, description="Measure the untuned base before the first step.")
    predictions: bool = Field(
        True, description="Leave the answers to held-out rows under `predictions/` in the result."
    )


class Checkpoints(_Frozen):
    every_steps: int | None = Field(None, ge=1, description="None: only at stop and at the end.")
    keep: int = Field(3, ge=1, description="Resume checkpoints kept; exports are all kept.")


class Limits(_Frozen):
    max_runtime_s: int | None = Field(None, ge=1)


class Output(_Frozen):
    merge: bool = Field(
        False, description="Also leave base and adapter as one model, under merged/ in the result."
    )


class InitFrom(_Frozen):
    """An earlier export to start from."""

    checkpoint: str
    optimizer: bool = False


class TrainingSpec(_Frozen):
    """Everything that decides what is computed."""

    version: Literal[1] = 1
    model: BaseModelRef
    task: Use
    method: Use
    adapter: Use
    transforms: tuple[Use, ...] = ()
    data: Data
    seed: int = Field(ge=0, le=2147483647)
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    limits: Limits = Limits()
    output: Output = Output()
    init_from: InitFrom | None = None

    def sha256(self) -> str:
        """Hash of the canonical JSON: equal specs, equal hash."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
