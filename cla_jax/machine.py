"""What this process has of the machine."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import IO

COMPILER = "compile"  # what the names of threads that compile begin with


def is_compiling() -> bool:
    """Whether a thread compiles, for which Python would wait at its end."""
    return any(thread.name.startswith(COMPILER) for thread in threading.enumerate())


@functools.cache
def cores() -> int:
    """Cores that this process may use; XLA has as many threads."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def check_threads(count: int) -> None:
    """Raises RuntimeError unless the system lets this process start so many further threads.

    Native libraries that meet the limit while they start a pool of threads may wait for ever.
    """
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        done.set()
        for thread in started:
            thread.join()


@contextlib.contextmanager
def stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Has a file get what is written to stderr, past Python too: by native code, and by new processes."""
    stderr = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def stderr_to_nowhere() -> Iterator[None]:
    """Drops what is written to stderr."""
    with open(os.devnull, "wb") as nowhere, stderr_to(nowhere):
        yield
