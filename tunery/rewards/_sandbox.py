"""Other people's Python, in a process that can compute and nothing else.

The process reads one request from a pipe and writes one answer to another. Before it runs a line
that is not ours, it gives up all else for good: a seccomp filter lets through the few system calls
that arithmetic needs (memory, the two pipes, clocks, its own end) and fails every other one, so no
file can be opened, no socket made, no process started and none signalled. Limits on processor time
and memory, an empty environment and a clock outside bound the rest.

Modules are imported before the filter falls, since afterwards no file can be read: those of
`MODULES` are at hand, others are not. Where the host has no seccomp, code is refused, not run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from tunery.errors import InvalidConfig, NotSupported

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULES = (
    "ast",
    "bisect",
    "collections",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "textwrap",
    "typing",
    "unicodedata",
)
"""What graded code may import."""
MEMORY_BYTES = 512 << 20
ANSWER_BYTES = 16 << 20
ITEM_S = 5
"""Processor seconds that one call may take."""


class SandboxFailed(Exception):
    """The process ended without an answer; says why."""


def grade(source: str, calls: Sequence[tuple[Any, Any]], *, timeout_s: float) -> list[Any]:
    """`grade(sample, item)` of `source` for each (sample, item): a number, or `{"error": ...}`.

    Args:
        timeout_s: for all calls together, on the wall's clock.

    Raises:
        NotSupported: this host cannot confine the process.
        InvalidConfig: `source` cannot be run, or has no function `grade`.
        SandboxFailed: out of time or memory, or killed.
    """
    require()
    answer = _run({"source": source, "calls": calls}, timeout_s)
    if "refused" in answer:
        raise InvalidConfig(f"the python grader's source: {answer['refused']}", param="grader")
    results: list[Any] = answer["results"]
    return results


def require() -> None:
    """Let a host pass that can confine.

    Raises:
        NotSupported: it cannot; says why.
    """
    reason = _unconfined()
    if reason is not None:
        raise NotSupported(
            f"python graders need a sandbox, and this host has none ({reason})",
            hint="use string_check, text_similarity, regex or another reward; or train on Linux "
            "with seccomp",
            param="grader.type",
        )


@cache
def _unconfined() -> str | None:
    """Why nothing can be confined here, found by trying; None where it can be."""
    if sys.platform != "linux":
        return f"no seccomp on {sys.platform}"
    probe = "def grade(sample, item):\n    open('/proc/self/status')\n"
    try:
        results = _run({"source": probe, "calls": [[{}, {}]]}, 30.0)["results"]
    except (SandboxFailed, KeyError) as error:
        return str(error) or type(error).__name__
    if not (isinstance(results[0], dict) and "PermissionError" in results[0].get("error", "")):
        return "the filter lets files be opened"
    return None


def _run(request: Any, timeout_s: float) -> dict[str, Any]:
    child = os.path.join(os.path.dirname(__file__), "_sandboxed.py")
    limits = {"modules": MODULES, "memory_bytes": MEMORY_BYTES, "item_s": ITEM_S}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", child, json.dumps(limits)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(json.dumps(request).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise SandboxFailed(f"no answer within {timeout_s:g} s") from error
        finally:
            process.kill()
    if process.returncode != 0 or len(out) > ANSWER_BYTES:
        raise SandboxFailed(_end(process.returncode))
    try:
        answer = json.loads(out)
    except ValueError as error:
        raise SandboxFailed("its answer cannot be read") from error
    return answer if isinstance(answer, dict) else {}


def _end(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "out of processor time"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "out of memory" if code == _NO_MEMORY else f"ended with code {code}"


_NO_MEMORY = 86
"""Exit code of the child; see `_sandboxed.py`."""
