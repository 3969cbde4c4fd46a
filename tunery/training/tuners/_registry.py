"""How PEFT learns of a tuner that is not its own."""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method


def register(name: str, config: type[Any], model: type[Any]) -> None:
    """Add a tuner to PEFT under its lower-case name.

    `register_peft_method` takes only names that are members of PEFT's enumeration, which has no
    door for others. Members are what Python's `enum` itself makes of a string; a test saves and
    loads such an adapter, and would tell if PEFT changed.
    """
    value = name.upper()
    if value in PeftType.__members__:
        return
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    register_peft_method(name=name, config_cls=config, model_cls=model)
