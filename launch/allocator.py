"""The process's memory: what is kept of it, and how often Python looks for garbage."""

import ctypes
import gc
import importlib.util
from importlib import metadata

# mallopt parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Where jax can only use the CPU, freed memory stays with the process; before jax is imported.

    XLA allocates a step's temporaries anew at every step. By default glibc hands them back to the
    system in between, and faulting the pages in again takes a sixth of a step of a small model
    (benchmarks/README.md). The process then holds its peak memory until it ends. It must be called
    before jax starts the threads that allocate. Returns whether it had an effect.
    """
    if importlib.util.find_spec("libtpu") or metadata.entry_points(group="jax_plugins"):
        return False  # an accelerator does the work, and many host threads allocate
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False  # not glibc
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
    taken = [mallopt(parameter, value) for parameter, value in settings.items()]
    return all(taken)


def collect_garbage_rarely() -> None:
    """Before jax is imported: it makes objects by the million, importing and tracing, and keeps them.

    Looking through them at Python's usual rate is a twentieth of the time to the first step.
    """
    gc.set_threshold(100_000, 50, 50)
