"""Tuners that PEFT lacks, in PEFT's own shape: saved and loaded like any of its own.

A module here has a configuration, a layer and a model class, and `register(...)` as its last lines.
PEFT reads an adapter's type from its file, so it must know these before it loads one;
`import tunery.adapters` sees to that.
"""

from __future__ import annotations

import importlib
import pkgutil


def register_all() -> None:
    """Make every tuner here known to PEFT; more than once does nothing more."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
