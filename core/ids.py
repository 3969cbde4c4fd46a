"""Public ids: a prefix that says what it is, then 24 random base-62 characters (142 bits)."""

from __future__ import annotations

import secrets
import string

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
LENGTH = 24
_IDS = len(ALPHABET) ** LENGTH

PROJECT = "proj_"
KEY = "key_"
FILE = "file-"
UPLOAD = "upload_"
PART = "part_"
JOB = "ftjob-"
EVENT = "ftevent-"
CHECKPOINT = "ftckpt_"
WORKER = "wk_"


def new_id(prefix: str) -> str:
    """A fresh id nobody can guess, for instance `ftjob-7Jb…`."""
    drawn = secrets.randbelow(_IDS)  # one draw for all: a draw for each costs ten times as much
    digits = []
    for _ in range(LENGTH):
        drawn, digit = divmod(drawn, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return prefix + "".join(digits)
