"""Where the time of a run went, over all its processes, and which share of it trained the model.

A clock is in exactly one bucket at any moment, so the buckets sum to the wall time:

    startup      from the start of the process to the first step, without what follows
    compile      waiting for the training step, which compiles beside the rest of the start
    data_wait    waiting for a batch
    step         dispatching steps and waiting for them; stopping on several hosts is agreed on here
    checkpoint   until the arrays have left the devices, and at the end until the last one is whole
    evaluation   the compilation of the evaluation included
    lost         steps, with their batches, of earlier processes that were not saved and are done again

Goodput is the share of `step`. Records in the metrics hold the sums over a run so far, so the newest is the
whole truth about it: a process that continues the run continues its sums. What is not counted: the time
between two processes, and a process that ends before its first step.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

Bucket = Literal["startup", "compile", "data_wait", "step", "checkpoint", "evaluation", "lost"]
BUCKETS: tuple[str, ...] = get_args(Bucket)

_IMPORTED = time.monotonic()


class Clock:
    """Books the time since `started` under one bucket after another, at first under startup.

    Args:
      started: when the process, or the run's share of it, began, on the scale of `now`; by default now.
      now: seconds on a clock that never goes back.
    """

    def __init__(self, started: float | None = None, now: Callable[[], float] = time.monotonic):
        self.now = now
        self.bucket: Bucket = "startup"
        self._since = now() if started is None else started
        self._seconds = dict.fromkeys(BUCKETS, 0.0)

    def switch(self, bucket: Bucket) -> Bucket:
        """Books what comes under `bucket`; returns the one before."""
        now = self.now()
        self._seconds[self.bucket] += now - self._since
        previous, self.bucket, self._since = self.bucket, bucket, now
        return previous

    @contextlib.contextmanager
    def timed(self, bucket: Bucket) -> Iterator[None]:
        """Books what happens inside under `bucket`, then goes on with the bucket before."""
        previous = self.switch(bucket)
        try:
            yield
        finally:
            self.switch(previous)

    def seconds(self) -> dict[str, float]:
        """Seconds by bucket up to now."""
        self.switch(self.bucket)
        return dict(self._seconds)

    def carry_on(self, earlier: dict[str, float]) -> None:
        """Adds what earlier processes of the run recorded."""
        for bucket, seconds in earlier.items():
            self._seconds[bucket] += seconds


def process_start() -> float:
    """When this process began, on the scale of `time.monotonic`.

    Where /proc does not say, as on macOS: when this module was imported.
    """
    try:
        with open("/proc/self/stat") as file:
            # Field 22, in ticks since boot; the name, field 2, may hold blanks and brackets.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return _IMPORTED
    return min(time.monotonic() - age, _IMPORTED)


def earlier(records: Iterable[dict[str, Any]], step: int) -> dict[str, float]:
    """Seconds that earlier processes of a run recorded, as the run continues from `step`.

    A killed process has not recorded what came after its last record. But the `seconds` of its steps since
    then are known. What it did when it was killed is not known.

    Args:
      records: the lines of the run's metrics, in the order of writing.
      step: the step that is restored; later ones are lost.
    """
    recorded = kept = dict.fromkeys(BUCKETS, 0.0)
    for record in records:
        if is_time_summary(record):
            recorded = {bucket: record.get(f"{bucket}_s", 0.0) for bucket in BUCKETS}
        elif "seconds" in record:
            recorded = recorded | {"step": recorded["step"] + record["seconds"]}
        else:  # an evaluation, or a note, which may be of an earlier step
            continue
        if record["step"] <= step:
            kept = recorded
    again = {bucket: kept[bucket] for bucket in ("data_wait", "step")}
    lost = sum(recorded[bucket] - seconds for bucket, seconds in again.items())
    return recorded | again | {"lost": recorded["lost"] + lost}


def time_summary(seconds: dict[str, float]) -> dict[str, float]:
    """The record of a run's time for the metrics: goodput, 0 to 1, and seconds by bucket."""
    total = sum(seconds.values())
    share = seconds["step"] / total if total else 0.0
    return {"goodput": round(share, 6)} | {f"{b}_s": round(s, 4) for b, s in seconds.items()}


def is_time_summary(record: dict[str, Any]) -> bool:
    """Whether a record is about the run's time, rather than about the step it was written at."""
    return "goodput" in record


def summary(seconds: dict[str, float]) -> str:
    """One line for people: goodput, and seconds and percent by bucket."""
    total = sum(seconds.values())
    percent = {bucket: 100 * spent / total if total else 0.0 for bucket, spent in seconds.items()}
    parts = [
        f"{bucket.replace('_', ' ')} {spent:,.1f} s ({percent[bucket]:.1f} %)"
        for bucket, spent in seconds.items()
    ]
    return f"goodput {percent['step']:.1f} % of {total:,.1f} s: {', '.join(parts)}"
