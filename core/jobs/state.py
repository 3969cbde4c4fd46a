"""What may follow what in a job's life, and what the world calls it.

The database's `job_guard` holds the same table; a test compares the two pair by pair.
"""

from __future__ import annotations

from enum import StrEnum

from tunery.errors import Conflict


class State(StrEnum):
    VALIDATING = "validating"  #: its data is being looked at
    QUEUED = "queued"  #: runnable; waits for a worker, a backoff or a manual start
    STARTING = "starting"  #: a worker holds the lease, no step is done yet
    RUNNING = "running"  #: the first step is done
    FINISHING = "finishing"  #: trained; the result is being published
    PAUSED = "paused"  #: stopped on request, resumable
    SUCCEEDED = "succeeded"  #: the result is committed
    FAILED = "failed"  #: no retry is left
    CANCELLED = "cancelled"  #: stopped on request, for good


NEXT: dict[State, frozenset[State]] = {
    State.VALIDATING: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
    State.QUEUED: frozenset({State.STARTING, State.PAUSED, State.CANCELLED}),
    State.STARTING: frozenset(
        {State.RUNNING, State.QUEUED, State.PAUSED, State.FAILED, State.CANCELLED}
    ),
    State.RUNNING: frozenset(
        {State.FINISHING, State.QUEUED, State.PAUSED, State.FAILED, State.CANCELLED}
    ),
    # To paused only when publishing failed and a pause was asked for: nothing else would be
    # both unclaimed and unclaimable.
    State.FINISHING: frozenset(
        {State.SUCCEEDED, State.QUEUED, State.PAUSED, State.FAILED, State.CANCELLED}
    ),
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

TERMINAL = frozenset(state for state in State if not NEXT[state])
OWNED = frozenset({State.STARTING, State.RUNNING, State.FINISHING})
"""States in which a worker holds the lease."""

STATUS: dict[State, str] = {
    State.VALIDATING: "validating_files",
    State.QUEUED: "queued",
    State.STARTING: "running",
    State.RUNNING: "running",
    State.FINISHING: "running",
    State.PAUSED: "paused",
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
"""What the API calls each state."""


def advance(current: State, to: State) -> State:
    """Return `to` if a job may go there from `current`.

    Raises:
        Conflict: the move is not in `NEXT`.
    """
    if to not in NEXT[current]:
        raise Conflict(f"a {current} job cannot become {to}")
    return to


def states_of(status: str) -> frozenset[State]:
    """The states that the API shows as `status`; empty for a status that does not exist."""
    return frozenset(state for state, name in STATUS.items() if name == status)
