"""What a bad end of training means for a trial: what is counted, and whether it is given up."""

import dataclasses
import signal

from launch.sweeps.records import State

COMPLETE, AGAIN, FAILED = 0, 42, 1  # exit codes of a runner, which every engine obeys
_USER_ERROR = 2
_ABORTED = (134, -signal.SIGABRT)  # jax ends a process so when another host is dead or silent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retry:
    """When a trial is given up: so many failures, or preemptions, in a row without a new checkpoint."""

    # Give a trial up after this many failures in a row without a new checkpoint.
    failures: int = 3
    # Give a trial up after this many preemptions in a row without a new checkpoint.
    preemptions: int = 100
    # Seconds until a failed trial is started again; doubled after each further failure, up to a minute.
    delay: float = 5.0

    def __post_init__(self):
        for field in ("failures", "preemptions"):
            if getattr(self, field) < 1:
                raise ValueError(f"--retry.{field} {getattr(self, field)} must be at least 1")
        if self.delay < 0:
            raise ValueError(f"--retry.delay {self.delay} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadEnd:
    """How an attempt at a trial ended, where it is not complete."""

    code: int  # of training
    error: str = ""  # the last it printed
    several: bool = False  # whether the trial has further hosts
    stopped: bool = False  # whether it was asked to stop
    progress: int = 0  # the newest checkpoint

    @property
    def preempted(self) -> bool:
        """Whether the trial itself did nothing wrong."""
        return self.stopped or self.code == AGAIN or (self.several and self.code in _ABORTED)


def judge(state: State, end: BadEnd, *, failures: int, preemptions: int) -> State:
    """The state of a trial after a bad end: `stopped`, or `failed` if it is given up.

    Limits are on preemptions and failures in a row without a new checkpoint. A mistake of the user's and a
    loss that is not finite would come again: they end a trial at once.
    """
    if end.progress > state.progress:
        state = dataclasses.replace(
            state, progress=end.progress, preempted_in_a_row=0, failed_in_a_row=0
        )
    if end.preempted:
        row = state.preempted_in_a_row + 1
        given_up, diverged = row >= preemptions, False
        error = state.error
        if given_up:
            error = f"preempted {row} times without a new checkpoint; {error}"
        counted = {"preemptions": state.preemptions + 1, "preempted_in_a_row": row}
    else:
        row = state.failed_in_a_row + 1
        diverged, error = end.error.startswith("diverged: "), end.error
        given_up = diverged or end.code == _USER_ERROR or row >= failures
        counted = {"failures": state.failures + 1, "failed_in_a_row": row}
    status = "failed" if given_up else "stopped"
    return dataclasses.replace(state, **counted, status=status, error=error, diverged=diverged)


def seconds_before_restart(state: State, delay: float) -> float:
    """How long a failed trial waits: `delay`, doubled after each further failure, up to a minute."""
    return min(max(60.0, delay), delay * 2 ** (state.failed_in_a_row - 1))
