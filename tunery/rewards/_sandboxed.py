"""The confined side of `_sandbox.py`: run as a script by a bare interpreter, imported by nobody.

argv[1] is JSON: {modules, memory_bytes, item_s}. Standard input is the request, {source, calls};
standard output takes the answer, {results} or {refused}.
"""

import builtins
import ctypes
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NO_MEMORY = 86
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_EPERM = 0x00050000 | 1
_KILL = 0x80000000

# Audit architecture, and the calls that computing needs: read write lseek mmap mprotect munmap brk
# rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack mremap madvise getpid gettid futex
# sched_yield clock_gettime gettimeofday time setitimer getrusage getrandom exit exit_group
# restart_syscall.
_MACHINES = {
    "x86_64": (
        0xC000003E,
        (
            *(0, 1, 8, 9, 10, 11, 12, 13, 14, 15, 131, 25, 28, 39, 186, 202),
            *(24, 228, 96, 201, 38, 98, 318, 60, 231, 219),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(63, 64, 62, 222, 226, 215, 214, 134, 135, 139, 132, 216, 233, 172, 178, 98),
            *(124, 113, 169, 103, 165, 278, 93, 94, 128),
        ),
    ),
}


def _confine() -> None:
    """From here on: no files, no sockets, no processes."""
    architecture, calls = _MACHINES[platform.machine()]
    load, jump_equal, jump_at_least, give = 0x20, 0x15, 0x35, 0x06
    steps = [
        (load, 0, 0, 4),  # the architecture that the call is made for
        (jump_equal, 1, 0, architecture),
        (give, 0, 0, _KILL),
        (load, 0, 0, 0),  # the call's number
        (jump_at_least, 0, 1, 0x40000000),  # x32's numbers
        (give, 0, 0, _KILL),
    ]
    for number in calls:
        steps += [(jump_equal, 0, 1, number), (give, 0, 0, _ALLOW)]
    steps.append((give, 0, 0, _EPERM))
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_ulong
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, word(1), word(0), word(0), word(0)):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if libc.prctl(_PR_SET_SECCOMP, word(_SECCOMP_MODE_FILTER), program, word(0), word(0)):
        raise OSError(ctypes.get_errno(), "seccomp")


def _limit(memory_bytes: int, cpu_s: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _only(modules: Sequence[str]) -> Callable[..., Any]:
    """`import` gives what is loaded and meant to be seen."""
    seen = {name: sys.modules[name] for name in modules}

    def given(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        if level or name not in seen:
            raise ImportError(f"no module {name!r} here; there are {', '.join(modules)}")
        return seen[name]

    return given


class _Slow(Exception):
    pass


def _alarm(*_: Any) -> None:
    raise _Slow


def _call(function: Callable[..., Any], sample: Any, item: Any, seconds: float) -> Any:
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        value = function(sample, item)
    except MemoryError:
        raise
    except _Slow:
        return {"error": f"it took more than {seconds} s"}
    except BaseException as error:  # whatever strangers raise, SystemExit too
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or value != value or abs(value) > 1e9:
        return {"error": "grade returned no number"}
    return float(value)


def _answer(request: Mapping[str, Any], modules: Sequence[str], seconds: float) -> dict[str, Any]:
    known = {**vars(builtins), "__import__": _only(modules)}
    scope: dict[str, Any] = {"__name__": "grader", "__builtins__": known}
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        exec(compile(request["source"], "<grader>", "exec"), scope)
    except MemoryError:
        raise
    except BaseException as error:
        return {"refused": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    function = scope.get("grade")
    if not callable(function):
        return {"refused": "it defines no function grade(sample, item)"}
    return {
        "results": [_call(function, sample, item, seconds) for sample, item in request["calls"]]
    }


def main() -> None:
    limits = json.loads(sys.argv[1])
    request = json.load(sys.stdin)
    for name in limits["modules"]:
        importlib.import_module(name)
    signal.signal(signal.SIGVTALRM, _alarm)
    _limit(limits["memory_bytes"], limits["item_s"] * (len(request["calls"]) + 1))
    _confine()
    out = sys.stdout.buffer  # looked up now: graded code may put another in its place
    try:
        answer = _answer(request, limits["modules"], limits["item_s"])
        out.write(json.dumps(answer).encode())
        out.flush()
    except MemoryError:
        os._exit(NO_MEMORY)
    os._exit(0)


if __name__ == "__main__":
    main()
