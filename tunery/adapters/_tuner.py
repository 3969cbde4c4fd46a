"""Entries over PEFT's tuners, in one shape.

An entry's `Config` has fields of PEFT's own configuration class under PEFT's names, with PEFT's
defaults; a test holds them against the real class, since torch must not be loaded to read them.
What is left to a module is its formula, its paper, and where it departs from the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from tunery.adapters import _peft
from tunery.adapters._targets import (
    ALL_LINEAR,
    check_names,
    has_bias,
    layers_of,
    linears_of,
    sizes_in,
    targets_in,
)
from tunery.entries import EntryConfig
from tunery.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tunery.entries import ModelShape
    from tunery.training.types import AdapterRun

_TRANSPOSED = frozenset({"gpt2"})
"""Families whose linears are stored (in, out)."""


class Linear(NamedTuple):
    """A linear module that an adapter sits on."""

    name: str
    """Its path inside the block, or the tail of it that `ModelShape.linear_shapes` knows."""
    inputs: int
    outputs: int
    bias: bool


class TunerConfig(EntryConfig):
    """Where an adapter sits."""

    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        min_length=1,
        description="Linear modules that get an adapter: names such as q_proj, or all of those in "
        "the transformer's blocks.",
    )

    @field_validator("target_modules")
    @classmethod
    def _names_are_names(cls, targets: Any) -> Any:
        if targets != ALL_LINEAR:
            check_names(targets, "target_modules")
        return targets


class LayeredConfig(TunerConfig):
    """Where an adapter sits, for tuners that can leave layers out."""

    layers_to_transform: tuple[int, ...] | None = Field(
        None, min_length=1, description="Layers, from 0, that get adapters; null: all."
    )

    @field_validator("layers_to_transform")
    @classmethod
    def _layers_count_from_0(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if any(layer < 0 for layer in layers or ()):
            raise ValueError("layers count from 0")
        return layers


class Tuner:
    """What the entries over PEFT's tuners share; a module fills in the rest."""

    name: ClassVar[str]
    peft_config: ClassVar[str]
    """PEFT's configuration class, by its name in `peft`."""
    departs: ClassVar[frozenset[str]] = frozenset()
    """Fields whose default is knowingly not PEFT's; `target_modules` always is."""
    seed_field: ClassVar[str | None] = None
    """Field of PEFT's configuration that takes the run's seed, where drawing depends on one."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """What PEFT is told beside the fields of `Config`."""
    transposed: ClassVar[bool] = True
    """Whether it sits on GPT-2's transposed linears too."""
    tasks: ClassVar[frozenset[str] | None] = None
    methods: ClassVar[frozenset[str] | None] = None
    strategies: ClassVar[frozenset[str] | None] = _peft.BY_BLOCK
    """Most read the base's weight beside its own forward pass, and ZeRO-3 has it in pieces then."""
    mergeable: ClassVar[bool] = True
    half_precision: ClassVar[bool] = True

    def per_linear(self, config: Any, linear: Linear) -> int:
        """Trained scalars on one module.

        Raises:
            InvalidConfig: the settings do not fit the module's sizes.
        """
        raise NotImplementedError

    def shared(self, config: Any, linears: Sequence[Linear]) -> int:
        """Trained scalars that belong to no single module. `linears` has a row per module."""
        return 0

    def trainable_parameters(self, config: Any, shape: ModelShape) -> int:
        """The sum over the adapted modules, what they share, and the head."""
        self._check_family(shape.model_type)
        layers = layers_of(shape, getattr(config, "layers_to_transform", None))
        linears = [
            Linear(name, inputs, outputs, has_bias(shape, name))
            for _ in layers
            for name, (inputs, outputs) in linears_of(shape, config.target_modules).items()
        ]
        return self._count(config, linears) + _peft.head_parameters(shape)

    def _count(self, config: Any, linears: Sequence[Linear]) -> int:
        own = sum(self.per_linear(config, linear) for linear in linears)
        return own + self.shared(config, linears)

    def starts_as_base(self, config: Any) -> bool:
        """True where PEFT's own initialisation makes the fresh adapter do nothing."""
        return True

    def base_when_disabled(self, config: Any) -> bool:
        return True

    def settings(self, config: Any, run: AdapterRun) -> dict[str, Any]:
        """PEFT's keyword arguments beside where the adapter sits."""
        values: dict[str, Any] = config.model_dump(exclude={"target_modules"})
        layers = values.pop("layers_to_transform", None)
        if layers is not None:
            values["layers_to_transform"] = list(layers)
        return values

    def apply(self, config: Any, run: AdapterRun) -> Any:
        """A `PeftModel` with this tuner's layers.

        Raises:
            InvalidConfig: a target is not in the model, or the settings do not fit its sizes.
        """
        import peft

        self._check_family(run.model.config.model_type)
        targets = targets_in(run.model, config.target_modules)
        self._count(config, [Linear(*row) for row in sizes_in(run.model, targets)])
        cls = getattr(peft, self.peft_config)
        known = cls.__dataclass_fields__
        values = {**self.settings(config, run), **self.fixed}
        if self.seed_field is not None:
            values[self.seed_field] = run.seed
        if "fan_in_fan_out" in known:
            values["fan_in_fan_out"] = _peft.fan_in_fan_out(run.model)
        return _peft.wrap(
            run,
            cls(
                task_type=run.task_type,
                target_modules=targets,
                modules_to_save=_peft.saved_modules(run),
                **values,
            ),
        )

    def _check_family(self, model_type: str) -> None:
        if model_type in _TRANSPOSED and not self.transposed:
            raise InvalidConfig(
                f"adapter {self.name!r} does not fit {model_type}, whose linear modules are stored "
                "transposed",
                hint="lora, vera and others do",
                code="unsupported_architecture",
                param="type",
            )


def divides(field: str, value: int, linear: Linear, sides: Iterable[str]) -> None:
    """Refuse a block size that does not divide the named sides, `inputs` or `outputs`.

    Raises:
        InvalidConfig: names the module and what would divide it.
    """
    for side in sides:
        features = getattr(linear, side)
        if features % value:
            fits = [n for n in range(1, features + 1) if features % n == 0]
            raise InvalidConfig(
                f"{field}: {value} does not divide the {features} {side} of {linear.name}",
                hint=f"these do: {', '.join(map(str, fits[-8:]))}; or name other target_modules",
                param=field,
            )


def at_most(field: str, value: int, limit: int, linear: Linear) -> None:
    """Refuse a value above what a module's sizes allow.

    Raises:
        InvalidConfig: names the module and the limit.
    """
    if value > limit:
        raise InvalidConfig(
            f"{field}: {value} is more than {linear.name} allows",
            hint=f"at most {limit}",
            param=field,
        )
