"""What this process has of the machine."""

import functools
import os


@functools.cache
def cores() -> int:
    """Cores that this process may use; XLA has as many threads."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
