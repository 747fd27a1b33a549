"""The C allocator, told to keep what a training step on the CPU frees."""

import ctypes
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
