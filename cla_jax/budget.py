"""Whether a compiled program fits into the memory there is, asked before it runs."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax

# Where Linux says what the processes of a container may use together; "max" is no limit.
_CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def check(compiled: Any, further: int, remedy: str) -> None:
    """Raises ValueError if a program needs more memory than there is.

    Args:
      compiled: what `jax.jit(...).lower(...).compile()` gives.
      further: further bytes in use on a device.
      remedy: what to change, for the message.
    """
    needed, available = program_bytes(compiled), available_bytes()
    if needed is None or available is None:  # not every backend says
        return
    needed += further
    where = f"{jax.local_devices()[0].device_kind} has"
    if _on_cpu():
        needed *= jax.local_device_count()  # they share the machine
        where = "machine has"
    if needed > available:
        raise ValueError(
            f"a step needs {needed / 2**30:,.2f} GiB of memory, but this {where} "
            f"{available / 2**30:,.2f} GiB: {remedy}"
        )


def program_bytes(compiled: Any) -> int | None:
    """Bytes of a device while a program runs: its arguments, temporaries and new results."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new


def available_bytes() -> int | None:
    """Bytes that a device may have in use; on a CPU those of the machine, or of its container."""
    if not _on_cpu():
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(file.read_text()))
    return min(limits)


def _on_cpu() -> bool:
    return jax.local_devices()[0].platform == "cpu"
