"""The memory of a process that computes on the CPU: what it keeps, and how often it looks for garbage."""

import ctypes
import gc
import importlib.util
import os
from importlib import metadata

from cla_jax import machine

# mallopt's parameters, from glibc's malloc.h, and madvise's advice, from Linux' mman.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGES = 14
# XLA on two cores aborted where it could start 20 threads, and did not with 30.
_XLA_THREADS = 32


def set_up() -> None:
    """What an entry point that computes does first: before jax is imported, and starts its threads.

    Raises RuntimeError if the system does not let it start them: XLA would abort.
    """
    accelerated = importlib.util.find_spec("libtpu") or metadata.entry_points(group="jax_plugins")
    libc = ctypes.CDLL(None)
    # With an accelerator many host threads allocate. mallopt is glibc's.
    tuned = not accelerated and hasattr(libc, "mallopt")
    if tuned:
        _keep_freed_memory(libc)  # before the first thread: glibc then fixes its number of arenas
    machine.check_threads(max(_XLA_THREADS, 4 * machine.cores()))
    # jax makes objects by the million, importing and tracing, and keeps them. Looking through them at
    # Python's usual rate is a twentieth of the time to the first step.
    gc.set_threshold(100_000, 50, 50)
    if tuned:
        _ask_for_huge_pages(libc)


def _keep_freed_memory(libc: ctypes.CDLL) -> None:
    """Freed memory stays with the process, which then holds its peak until it ends.

    XLA allocates a step's temporaries anew at every step. By default glibc returns them to the system in
    between. Then page faults take a sixth of a step of a small model (benchmarks/README.md).
    """
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """For the first quarter of the machine's memory that the process allocates, if Linux has them.

    Decoding reads every weight for every token: a small model takes a tenth less time for one, and
    less depends on which pages it got. Reserving costs addresses only.
    """
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, (ctypes.c_ssize_t,)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = os.sysconf("SC_PAGE_SIZE")
    begin = libc.sbrk(0) // page * page
    libc.free(libc.malloc(os.sysconf("SC_PHYS_PAGES") * page // 4))  # at the heap's end, and kept
    libc.madvise(begin, libc.sbrk(0) - begin, _HUGE_PAGES)
