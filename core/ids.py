"""Public ids: a prefix that says what it is, then 24 random base-62 characters (142 bits)."""

from __future__ import annotations

import secrets
import string

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
LENGTH = 24

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
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))
