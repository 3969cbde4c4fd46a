"""WHICH parameters train.

Importing this package, before or after PEFT, lets PEFT load what Tunery's own tuners saved. PEFT
itself is not imported here: the service reads the catalogue without it.
"""

from __future__ import annotations

import sys

from tunery.adapters._introduction import when_imported


def _introduce() -> None:
    from tunery.training.tuners import register_all

    register_all()


if "peft" in sys.modules:
    _introduce()
else:
    when_imported("peft", _introduce)
