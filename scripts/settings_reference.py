"""Print `docs/configuration.md`, made from `core/settings.py`.

    python -m scripts.settings_reference > docs/configuration.md

`tests/docs/test_configuration.py` holds the page to the settings.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr

from core.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

INTRODUCTION = """\
<!-- Made by `python -m scripts.settings_reference > docs/configuration.md`; do not edit. -->

# Configuration

Every setting is an environment variable, read once when a process starts; there is no other
configuration file. API, worker, `migrate` and the command line of one installation read the same
variables. `tunery doctor` prints what a process sees, with secrets blanked.

Where a default reads "unset", the last column says what happens then. Durations are in seconds,
sizes in bytes, and their names say so.

| Variable | Type | Default | Meaning |
| --- | --- | --- | --- |
"""

AFTERWORD = """
Four durations belong together: a worker renews its claim every `TUNERY_BEAT_S`, a trainer that was
not renewed for three quarters of `TUNERY_LEASE_S` is killed on its own machine, and a claim that
was not renewed for all of it is given to another worker. Keep `TUNERY_BEAT_S` under a quarter of
`TUNERY_LEASE_S`, and give a container that runs a worker a stop grace longer than
`TUNERY_STOP_GRACE_S`, so that trainers can write their checkpoints.
"""


def page() -> str:
    """The whole page, as Markdown."""
    return INTRODUCTION + "\n".join(rows()) + "\n" + AFTERWORD


def rows() -> Iterator[str]:
    """One table row for each setting, in the order of the class."""
    prefix = Settings.model_config["env_prefix"]
    for name, field in Settings.model_fields.items():
        cells = [
            f"`{prefix}{name.upper()}`",
            f"{kind(field)}{bounds(field)}",
            default(field),
            str(field.description).replace("None:", "unset:"),
        ]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def kind(field: FieldInfo) -> str:
    """What a person has to write: `number`, `path`, `secret`, ..."""
    names = {
        bool: "true or false",
        int: "integer",
        float: "number",
        str: "text",
        SecretStr: "secret",
    }
    annotation = field.annotation
    for candidate in (annotation, *get_args(annotation)):
        if candidate in names:
            return names[candidate]
    return "path"


def bounds(field: FieldInfo) -> str:
    """The limits that are checked, such as ` > 0`; empty when there are none."""
    signs = {Gt: "gt", Ge: "ge", Lt: "lt", Le: "le"}
    written = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{written[signs[type(limit)]]} {getattr(limit, signs[type(limit)]):g}"
        for limit in field.metadata
        if type(limit) in signs
    ]
    return f" {', '.join(found)}" if found else ""


def default(field: FieldInfo) -> str:
    """The default as it would stand in the environment."""
    value: Any = field.default
    if value is None:
        return "unset"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()  # a default is public; a value that was set is not
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
